// BullMQ: jobs in a private Redis, which by default has each write on disk before it acknowledges it.
//
// With `--appendfsync everysec`, for information, a crash of the machine would lose what Redis acknowledged in the last
// second.

import { parseArgs } from 'node:util';
import { Queue, Worker } from 'bullmq';
import { inBatches, runPeer, versioned } from './peer.mjs';
import { startRedis } from './redis.mjs';

const QUEUE = 'deliveries';

const { appendfsync } = parseArgs({ options: { appendfsync: { type: 'string', default: 'always' } } }).values;

runPeer({
    name: versioned('bullmq'),
    settings: {
        appendonly: 'yes',
        appendfsync,
        processes: 1,
        concurrency: 50,
        connections: 50,
        enqueueBatch: 1000,
    },

    async prepare({ enqueueBatch }, deliveries, onEnd) {
        const redis = await startRedis(appendfsync);
        onEnd(redis.stop);
        const connection = { path: redis.socket, maxRetriesPerRequest: null };
        const queue = new Queue(QUEUE, { connection, defaultJobOptions: { removeOnComplete: true } });
        onEnd(() => queue.close());
        const job = { name: 'deliver', data: {} };
        await inBatches(deliveries, enqueueBatch, (count) => queue.addBulk(Array(count).fill(job)));
        return {
            store: connection,
            async unfinished() {
                const counts = await queue.getJobCounts('waiting', 'active', 'delayed', 'failed');
                return Object.values(counts).reduce((sum, count) => sum + count, 0);
            },
        };
    },

    work({ concurrency }, deliver, connection) {
        const worker = new Worker(QUEUE, deliver, { connection, concurrency });
        worker.on('error', (error) => {
            throw error;
        });
        return () => worker.close();
    },
});

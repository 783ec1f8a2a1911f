// graphile-worker: jobs in PostgreSQL, fetched by a local queue and completed in batches. A completed job's row is gone.

import { Logger, makeWorkerUtils, run } from 'graphile-worker';
import pg from 'pg';
import { inBatches, required, runPeer, versioned } from './peer.mjs';

const logger = new Logger(() => (level, message) => {
    if (level === 'error') {
        console.error(message.split('\n', 1)[0]);
    }
});

function openPool(connectionsMax) {
    const pool = new pg.Pool({ connectionString: required('DATABASE_URL'), max: connectionsMax });
    const fail = (error) => {
        throw error;
    };
    // graphile-worker asks for both handlers.
    return pool.on('error', fail).on('connect', (client) => client.on('error', fail));
}

runPeer({
    name: versioned('graphile-worker'),
    settings: {
        processes: 1,
        concurrentJobs: 24,
        connections: 24,
        localQueueSize: 2000,
        completeJobBatchDelay: 5,
        poolSize: 10,
        enqueueBatch: 2000,
    },

    async prepare({ enqueueBatch }, deliveries, onEnd) {
        const pool = openPool(5);
        onEnd(() => pool.end());
        const utils = await makeWorkerUtils({ pgPool: pool, logger });
        onEnd(() => utils.release());
        await utils.migrate();
        const job = { identifier: 'deliver', payload: {} };
        await inBatches(deliveries, enqueueBatch, (count) => utils.addJobs(Array(count).fill(job)));
        return {
            async unfinished() {
                const { rows } = await pool.query('select count(*)::int as jobs from graphile_worker.jobs');
                return rows[0].jobs;
            },
        };
    },

    async work({ concurrentJobs, localQueueSize, completeJobBatchDelay, poolSize }, deliver) {
        const pool = openPool(poolSize);
        const runner = await run({
            pgPool: pool,
            logger,
            taskList: { deliver },
            noHandleSignals: true,
            preset: { worker: { concurrentJobs, localQueue: { size: localQueueSize }, completeJobBatchDelay } },
        });
        return async () => {
            await runner.stop();
            await pool.end();
        };
    },
});

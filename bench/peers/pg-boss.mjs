// pg-boss: jobs in PostgreSQL, in a partition of their own, fetched, done and completed in batches. Completed rows stay.

import { PgBoss } from 'pg-boss';
import { inBatches, required, runPeer, versioned } from './peer.mjs';

const QUEUE = 'deliveries';

async function startBoss(options) {
    const boss = new PgBoss({ connectionString: required('DATABASE_URL'), schedule: false, ...options });
    boss.on('error', (error) => {
        throw error;
    });
    await boss.start();
    return boss;
}

runPeer({
    name: versioned('pg-boss'),
    settings: {
        processes: 1,
        localConcurrency: 2,
        batchSize: 500,
        connections: 50,
        poolSize: 4,
        enqueueBatch: 1000,
    },

    async prepare({ enqueueBatch }, deliveries, onEnd) {
        const boss = await startBoss({ max: 5 });
        onEnd(() => boss.stop({ graceful: false }));
        await boss.createQueue(QUEUE, { partition: true });
        const job = { data: {} };
        await inBatches(deliveries, enqueueBatch, (count) => boss.insert(QUEUE, Array(count).fill(job)));
        const unfinished = "select count(*)::int as jobs from pgboss.job where name = $1 and state <> 'completed'";
        return {
            async unfinished() {
                const { rows } = await boss.getDb().executeSql(unfinished, [QUEUE]);
                return rows[0].jobs;
            },
        };
    },

    async work({ localConcurrency, batchSize, poolSize }, deliver) {
        const boss = await startBoss({ max: poolSize, migrate: false });
        // A worker that got a full batch fetches again at once.
        const options = { localConcurrency, batchSize, burstWhenBatchFull: true, pollingIntervalSeconds: 0.5 };
        await boss.work(QUEUE, options, async (jobs) => {
            await Promise.all(jobs.map(deliver));
        });
        return () => boss.stop();
    },
});

// What every peer shares: the protocol with whoever runs the benchmark, the worker processes, and the GET of a job.
// Not for anything about one queue: each peer's own file holds that.

import { fork } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { Pool } from 'undici';

const STALLED_SECONDS_MAX = 60;
const TIDY_UP_SECONDS_MAX = 5;
const REPORT_MILLISECONDS = 5;
const POLL_MILLISECONDS = 2;
const ENQUEUE_LANES = 3;

/**
 * Runs one peer, in the process that was started and, with the same file, in its worker processes.
 *
 * - `name`: what the result calls the peer.
 * - `settings`: the peer's best ones. `processes` says how many worker processes there are, `connections` how many
 *   connections each has to the receiver; the rest is the peer's own. The environment's PEER_SETTINGS, a JSON object,
 *   replaces single ones.
 * - `prepare(settings, deliveries, onEnd)`: makes the store ready and enqueues the jobs; what it gives to `onEnd` is
 *   called when the run is over. Returns `unfinished()`, which asks the store how many jobs it has not yet recorded as
 *   done, and `store`, what a worker process must be told to find the store.
 * - `work(settings, deliver, store)`: in a worker process, calls `deliver` once a job; returns how to stop it.
 */
export async function runPeer({ name, settings, prepare, work }) {
    const chosen = { ...settings, ...JSON.parse(process.env.PEER_SETTINGS ?? '{}') };
    if (process.env.PEER_WORKER) {
        runWorker(chosen, work);
        return;
    }
    const run = new Run(chosen.processes);
    let exitCode = 0;
    try {
        const deliveries = Number(required('DELIVERIES'));
        if (!Number.isSafeInteger(deliveries) || deliveries < 1) {
            throw new Error('DELIVERIES is not a whole number from 1 on');
        }
        const drained = drain(run, deliveries, () => prepare(chosen, deliveries, run.onEnd));
        const seconds = await Promise.race([run.failed, drained]);
        console.log(JSON.stringify({ peer: name, settings: asText(chosen), deliveries, seconds }));
    } catch (error) {
        console.error(`${name}: ${error.message || error.code}`);
        exitCode = error.exitCode ?? 1;
    }
    await run.end();
    process.exit(exitCode);
}

/** The name of an installed npm package, with its version. */
export function versioned(packageName) {
    const manifest = new URL(`node_modules/${packageName}/package.json`, import.meta.url);
    return `${packageName} ${JSON.parse(readFileSync(manifest, 'utf8')).version}`;
}

/** What an environment variable says that has to be set. */
export function required(variable) {
    const value = process.env[variable];
    if (!value) {
        throw new Error(`${variable} is not set`);
    }
    return value;
}

/** Enqueues `total` jobs by calls of `enqueue(count)`, at most `batch` jobs a call and a few calls at a time. */
export async function inBatches(total, batch, enqueue) {
    let left = total;
    const lane = async () => {
        while (left > 0) {
            const count = Math.min(batch, left);
            left -= count;
            await enqueue(count);
        }
    };
    await Promise.all(Array.from({ length: ENQUEUE_LANES }, lane));
}

/** From the empty store to the last recorded completion; returns the seconds from the go on. */
async function drain(run, deliveries, prepare) {
    const { unfinished, store } = await prepare();
    await run.workersReady;
    const go = run.nextLine();
    console.log('ready');
    await go;

    const started = performance.now();
    run.startWorkers(store);
    // Only then is the store asked: while jobs run, the question would cost the peer some of its speed.
    await run.answeredAtLeast(deliveries);
    const answered = performance.now();
    for (let left = await unfinished(); left > 0; left = await unfinished()) {
        if (performance.now() - answered > STALLED_SECONDS_MAX * 1000) {
            throw new Error(`${left} jobs are not done ${STALLED_SECONDS_MAX} seconds after the last answer`);
        }
        await sleep(POLL_MILLISECONDS);
    }
    const seconds = (performance.now() - started) / 1000;

    await run.stopWorkers();
    if (run.answered !== deliveries) {
        throw new Error(`${deliveries} jobs took ${run.answered} requests`);
    }
    return seconds;
}

/** One run as the process that was started sees it: its worker processes, its standard input, what to tidy up. */
class Run {
    #workers = [];
    #answered;
    #onLine;
    #answeredAt;
    #tidyUp = [];

    constructor(processes) {
        this.failed = new Promise((_, fail) => {
            this.fail = fail;
        });
        for (const [signal, exitCode] of [['SIGINT', 130], ['SIGTERM', 143]]) {
            process.on(signal, () => this.fail(Object.assign(new Error(`stopped by ${signal}`), { exitCode })));
        }
        process.on('uncaughtException', this.fail);
        this.#answered = Array(processes).fill(0);
        this.workersReady = Promise.all(this.#answered.map((_, index) => this.#fork(index)));
        const lines = createInterface({ input: process.stdin });
        lines.on('line', () => this.#onLine?.());
        lines.on('close', () => this.fail(new Error('standard input was closed before the result')));
    }

    get answered() {
        return this.#answered.reduce((sum, count) => sum + count, 0);
    }

    nextLine() {
        return new Promise((resolve) => {
            this.#onLine = resolve;
        });
    }

    startWorkers(store) {
        for (const worker of this.#workers) {
            worker.send({ start: store ?? null });
        }
    }

    async answeredAtLeast(count) {
        this.#answeredAt = performance.now();
        this.#answeredAt = performance.now();
        while (this.answered < count) {
            await sleep(POLL_MILLISECONDS);
            if (performance.now() - this.#answeredAt > STALLED_SECONDS_MAX * 1000) {
                throw new Error(`no answer for ${STALLED_SECONDS_MAX} seconds, ${this.answered} of ${count} so far`);
            }
        }
    }

    async stopWorkers() {
        const ended = this.#workers.map((worker) => new Promise((resolve) => worker.on('exit', resolve)));
        for (const worker of this.#workers) {
            worker.stopping = true;
            worker.send({ stop: true });
        }
        await Promise.all(ended);
    }

    onEnd = (action) => {
        this.#tidyUp.push(action);
    };

    /** Ends the worker processes and closes the store, as far as that can be done in time. */
    async end() {
        for (const worker of this.#workers) {
            worker.stopping = true;
            worker.kill('SIGKILL');
        }
        const tidyUp = async () => {
            for (const action of this.#tidyUp.reverse()) {
                await action();
            }
        };
        await Promise.race([tidyUp(), sleep(TIDY_UP_SECONDS_MAX * 1000)]).catch(() => {});
    }

    #fork(index) {
        const worker = fork(process.argv[1], process.argv.slice(2), {
            env: { ...process.env, PEER_WORKER: 'yes' },
            stdio: ['ignore', 2, 2, 'ipc'],
        });
        this.#workers.push(worker);
        worker.on('exit', (code, signal) => {
            if (!worker.stopping) {
                this.fail(new Error(`a worker process ended with ${signal ?? code}`));
            }
        });
        return new Promise((ready) => {
            worker.on('message', (message) => {
                if (message.failed) {
                    this.fail(new Error(message.failed));
                } else if (message.answered !== undefined) {
                    this.#answered[index] = message.answered;
                    this.#answeredAt = performance.now();
                } else {
                    ready();
                }
            });
        });
    }
}

/** A worker process: waits for the start, works until it is told to stop, and reports how many answers it had. */
function runWorker(settings, work) {
    const fail = (error) => process.send({ failed: error.message || error.code });
    process.on('uncaughtException', fail);
    // It is the parent who ends a worker; without one there is nothing to work for.
    process.on('SIGINT', () => {});
    process.on('SIGTERM', () => {});
    process.on('disconnect', () => process.exit(1));

    const client = new Client(new URL(required('RECEIVER_URL')), settings.connections);
    let answered = 0;
    let reported = 0;
    const report = () => {
        if (answered !== reported) {
            reported = answered;
            process.send({ answered });
        }
    };
    const deliver = async () => {
        try {
            await client.get();
        } catch (error) {
            // The queue would try again; the run is over.
            fail(error);
            throw error;
        }
        answered += 1;
    };

    let stop;
    process.on('message', async (message) => {
        try {
            if (message.stop) {
                await stop();
                process.send({ answered }, () => process.exit(0));
            } else {
                setInterval(report, REPORT_MILLISECONDS);
                stop = await work(settings, deliver, message.start);
            }
        } catch (error) {
            fail(error);
        }
    });
    process.send({ ready: true });
}

/** GETs one URL over connections that are kept alive. Anything but an answer of 200, read to its end, is an error. */
class Client {
    #pool;
    #request;

    constructor(url, connections) {
        this.#pool = new Pool(url.origin, { connections });
        this.#request = { method: 'GET', path: url.pathname + url.search };
    }

    // `dispatch` is the fastest of undici's ways: `request` would make a stream of each body.
    get() {
        return new Promise((resolve, reject) => {
            let status;
            this.#pool.dispatch(this.#request, {
                onRequestStart() {},
                onResponseStart(_controller, statusCode) {
                    status = statusCode;
                },
                onResponseData() {},
                onResponseEnd() {
                    if (status === 200) {
                        resolve();
                    } else {
                        reject(new Error(`the receiver answered ${status}`));
                    }
                },
                onResponseError(_controller, error) {
                    reject(new Error(`the receiver did not answer: ${error.message || error.code}`));
                },
            });
        });
    }
}

/** Settings as a result shows them. */
function asText(settings) {
    return Object.entries(settings)
        .map(([key, value]) => `${key} ${value}`)
        .join(', ');
}

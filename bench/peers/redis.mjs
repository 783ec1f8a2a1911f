// A private Redis server in a directory of its own, gone when it is stopped or when this process ends in any way.

import { spawn } from 'node:child_process';
import { access, mkdtemp } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

const START_SECONDS_MAX = 10;

// A shell that outlives us for as long as it takes to clean up: our end, whatever the way, closes its standard input.
const KEEPER = `
trap '' INT TERM
dir=$1 appendfsync=$2
redis-server --port 0 --unixsocket "$dir/socket" --dir "$dir" --save '' --appendonly yes \
    --appendfsync "$appendfsync" --daemonize no --logfile "$dir/log" </dev/null &
read -r _
kill -9 $!
wait $!
rm -rf "$dir"
`;

/** Starts Redis, listening on a Unix socket only; `appendfsync` says when a write is on disk. */
export async function startRedis(appendfsync) {
    const directory = await mkdtemp(join(tmpdir(), 'bench-redis-'));
    const socket = join(directory, 'socket');
    const keeper = spawn('sh', ['-c', KEEPER, 'redis-keeper', directory, appendfsync], {
        stdio: ['pipe', 2, 2],
        detached: true,
    });
    const ended = new Promise((resolve) => keeper.on('exit', resolve));
    const stop = async () => {
        keeper.stdin.end();
        await ended;
    };
    for (let waited = 0; waited < START_SECONDS_MAX * 100; waited += 1) {
        try {
            await access(socket);
            return { socket, stop };
        } catch {
            await sleep(10);
        }
    }
    await stop();
    throw new Error(`redis-server did not start within ${START_SECONDS_MAX} seconds; is it installed?`);
}

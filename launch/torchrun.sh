#!/usr/bin/env bash
# torchrun with what elastic restarts need; takes torchrun's arguments:
#
#   launch/torchrun.sh --nproc-per-node 8 --max-restarts 3 -m distllm train model=llama3_8b train.precision=bf16 run.dir=runs/mine
#
# On several nodes the same line on each, with one node's name; --nnodes=2:4 would go on with 2 to 4 of them:
#
#   launch/torchrun.sh --nnodes=4 --rdzv-backend=c10d --rdzv-endpoint=node1:29400 --nproc-per-node 8 ...
#
# (--node-rank with --master-addr starts too, but cannot restart in place, since its ranks always use the agent's store:
# refused with --max-restarts. On one machine --master-port is the port of the rendezvous, and restarts work.)
# An argument given here again wins over the one below.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
if [[ -x $repository/.venv/bin/python ]]; then
    python=$repository/.venv/bin/python
fi

# distllm warns where torchrun is used without this script.
export DISTLLM_LAUNCHER=torchrun.sh
# Restarted ranks would read stale addresses from the store that the agent keeps between restarts, and fail
# (pytorch#135712): with this they make a store of their own each time.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Where the number of nodes may vary, a job is laid out anew for the nodes that are left (fault.replan).
if [[ " $* " =~ \ --nnodes[=\ ][0-9]+:[0-9]+\  ]]; then
    export DISTLLM_ELASTIC=1
fi
# torchrun would set the same, with a warning.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

options=(
    # USR1 asks the ranks to save and end; torchrun would die of it and leave them behind.
    --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    # Time for that save, before torchrun kills: its 30 s are too short for a large model.
    --shutdown-timeout 120
    # With --rdzv-endpoint; others do not read it. A lost node is noticed after 5 s instead of 15, and a rendezvous
    # that has its least number of nodes waits 3 s for more instead of 30: who comes later joins by a restart.
    --rdzv-conf "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=5"
)
# torchrun's own arguments end where the program begins.
arguments="$*"
agent=" ${arguments%% -m *} "
# Alone on one machine torchrun takes a static rendezvous, whose ranks meet in the agent's store whatever is set
# above; --standalone has none of that, and any free port. Its ranks would look for each other by the machine's name,
# which nobody resolves in some containers.
if [[ ! $agent =~ \ --(nnodes|node.rank|rdzv|master|standalone) ]]; then
    options+=(--standalone --local-addr 127.0.0.1)
elif [[ ! $agent =~ \ --(nnodes|node.rank|rdzv|master.addr|standalone) && $agent =~ \ --master.port[=\ ]([0-9]+) ]]; then
    options+=(--rdzv-backend c10d --rdzv-endpoint "127.0.0.1:${BASH_REMATCH[1]}" --local-addr 127.0.0.1)
elif [[ $agent =~ \ --(node.rank|master) && ! $agent =~ \ --rdzv && $agent =~ \ --max.restarts[=\ ][1-9] ]]; then
    echo "launch/torchrun.sh: ranks that are started with --node-rank and --master-addr cannot restart in place" >&2
    echo "    fix:  --rdzv-backend=c10d --rdzv-endpoint=ADDRESS:PORT instead of both, the same on every node" >&2
    exit 2
fi
exec "$python" -m torch.distributed.run "${options[@]}" "$@"

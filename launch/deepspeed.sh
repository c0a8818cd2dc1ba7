#!/usr/bin/env bash
# DeepSpeed's launcher: a hostfile (lines like `node1 slots=8`), then deepspeed's arguments:
#
#   launch/deepspeed.sh hostfile --module distllm train model=llama3_8b train.precision=bf16 run.dir=runs/mine
#
# It reaches the hosts by pdsh and ssh. Where there is no ssh, the same line on every host, with its number:
#
#   launch/deepspeed.sh hostfile --no_ssh --node_rank 0 --master_addr node1 --module distllm train ...
#
# Without GPUs: DS_ACCELERATOR=cpu launch/deepspeed.sh ...
#
# Signals to this script: USR1 asks the ranks on this host to save and end, in their own time (the ranks of other hosts
# end with them). TERM, INT and HUP end the job; DeepSpeed gives the ranks 30 s for it. No rank on this host is left.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
if [[ -x $repository/.venv/bin/python ]]; then
    python=$repository/.venv/bin/python
fi
if (($# < 2)) || [[ ! -f $1 ]]; then
    echo "usage: $0 HOSTFILE [options of deepspeed] --module distllm train ..., where HOSTFILE is a file" >&2
    exit 2
fi
hostfile=$1
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# The runner starts a launcher, which starts the ranks; neither passes all signals on, and a runner that dies leaves
# the rest behind. So they get a process group of their own, and signals go to all of it. USR1 is ignored from the
# start: the runner and the launcher keep it so, a rank puts its own handler in place.
(
    trap '' USR1
    exec setsid "$python" -m deepspeed.launcher.runner --hostfile "$hostfile" "$@"
) &
group=$!
pass() { kill -s "$1" -- "-$group" 2> /dev/null || kill -s "$1" "$group" 2> /dev/null || true; }
told_to_end=false
trap 'pass USR1' USR1
trap 'told_to_end=true; pass TERM' TERM INT HUP
while kill -0 "$group" 2> /dev/null; do
    wait "$group" || true # it also returns when a signal has come
done
code=0
wait "$group" || code=$?

# The runner can end before the ranks: they have what DeepSpeed gives them, 30 s, and a little more.
for ((tenths = 0; tenths < 350; tenths++)); do
    kill -0 -- "-$group" 2> /dev/null || exit "$code"
    if [[ $told_to_end == false ]]; then
        told_to_end=true
        pass TERM
    fi
    sleep 0.1
done
pass KILL
exit "$code"

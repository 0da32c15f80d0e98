# shellcheck shell=bash
# The part that the job scripts of this directory share; they set EXPERIMENT and source it. Runs on the first node of the
# job, outside of any container, with bash and Slurm's commands alone; whatever needs Python is in launch/.
set -euo pipefail

# How many starts in a row came to nothing. The launcher of the first node removes the file once it has counted the start
# for itself (launch/restarts.py). One that dies before it counts would be requeued without end, below or, with its node,
# by Slurm.
export STARTS_FILE=$PWD/${EXPERIMENT}_$SLURM_JOB_ID.starts
# The status of a launcher that ends the job for good. srun tells the highest of all nodes alone, which is that of a node
# that was killed while it waited for this one.
export VERDICT_FILE=$PWD/${EXPERIMENT}_$SLURM_JOB_ID.verdict
end() { # with this status, for good
    rm -f "$STARTS_FILE" "$VERDICT_FILE"
    exit "$1"
}
fail() {
    echo "error: $*" >&2
    end 2
}
starts() {
    local number=0
    [[ ! -s $STARTS_FILE ]] || read -r number <"$STARTS_FILE"
    echo "$number"
}
give_up_after_too_many() {
    (($(starts) > ${MAX_RESTARTS:-3})) || return 0
    echo "given up: the last $(starts) starts came to nothing (MAX_RESTARTS=${MAX_RESTARTS:-3})" >&2
    end 86
}
give_up_after_too_many
rm -f "$VERDICT_FILE" # of a start that was lost together with this script
echo $(($(starts) + 1)) >"$STARTS_FILE" || fail "$STARTS_FILE cannot be written"

# Other nodes connect to the first one. There is no fallback: with localhost every node would wait for itself.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
name=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
read -r MASTER_ADDR _ < <(getent ahosts "${name:-$head}") ||
    fail "the first node, $head (${name:-no NodeAddr}), does not resolve on $(hostname); mend DNS, /etc/hosts or NodeAddr"
[[ $MASTER_ADDR != 127.* || $name == "$MASTER_ADDR" || $SLURM_JOB_NUM_NODES == 1 ]] ||
    fail "the first node, $head ($name), resolves to $MASTER_ADDR, where no other node finds it; mend /etc/hosts"
# Another port at each start: something of the last one may still hold its own.
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 10000))}

options=(--ntasks-per-node=1 --cpu-bind=none)
# When a node has ended, well or not, the rest has two minutes: the first node is still to say how the run goes on.
options+=(--kill-on-bad-exit=0 --wait=120)
if [[ -n ${CONTAINER_IMAGE:-} ]]; then # pyxis and enroot
    options+=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD")
    options+=(--container-mounts="${CONTAINER_MOUNTS:-$LLADA_MEGA_HOME:$LLADA_MEGA_HOME,$PWD:$PWD}")
fi

# bash runs a trap only between commands, so srun is in the background.
srun "${options[@]}" "$LLADA_MEGA_HOME/launch/torchrun.sh" experiment="$EXPERIMENT" "$@" &
step=$! interrupted='' cancelled=''
trap 'interrupted=1; echo "the time limit is near: asking for a checkpoint"; kill -USR1 "$step" 2>/dev/null || true' USR1
trap 'interrupted=1 cancelled=1' TERM # scancel or preemption; Slurm has told the processes itself
while true; do
    status=0
    wait "$step" || status=$?
    [[ -n $interrupted ]] || break
    interrupted=''
done

[[ -z $cancelled ]] || exit 143 # a preempted job is requeued by Slurm, a cancelled one by nobody
[[ ! -s $VERDICT_FILE ]] || read -r status <"$VERDICT_FILE"
if ((status != 85 && status < 128)); then
    echo "the job ends with status $status ($LLADA_MEGA_HOME/docs/cluster.md)"
    end "$status"
fi
give_up_after_too_many
echo "requeued with status $status, restart $((${SLURM_RESTART_COUNT:-0} + 1))"
scontrol requeue "$SLURM_JOB_ID" || fail "Slurm does not requeue this job; submit it again, it resumes"

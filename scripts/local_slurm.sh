#!/usr/bin/env bash
# A SLURM of one node on this machine, to try submissions out and to test them. Needs root and Debian's slurm-wlm.
#
#   scripts/local_slurm.sh start [directory]   # then: export SLURM_CONF=<directory>/slurm.conf
#   scripts/local_slurm.sh stop [directory]    # cancels what is queued
#
# It listens on 127.0.0.1 alone, on ports of its own, keeps its state in the directory (/tmp/dcdit_slurm) and touches no
# other SLURM of the machine. It has no accounting, offers 16 slots whatever the number of cores, and binds nothing.
set -euo pipefail

fail() {
    echo "local_slurm.sh: $1" >&2
    exit 2
}

action=${1:-}
directory=${2:-/tmp/dcdit_slurm}

start() {
    [ "$(id -u)" = 0 ] || fail "starting SLURM's daemons needs root"
    for program in slurmctld slurmd munged; do
        command -v "$program" > /dev/null || fail "$program is missing: apt-get install slurm-wlm munge"
    done
    mkdir -p "$directory"/{state,spool}
    directory=$(cd "$directory" && pwd)
    local host
    host=$(hostname -s)
    local ports=()
    # Two free ports of this moment, so that several of these do not meet.
    mapfile -t ports < <(python3 - << 'PYTHON'
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(each.getsockname()[1] for each in sockets), sep="\n")
PYTHON
    )
    cat > "$directory/slurm.conf" << CONF
ClusterName=dcdit
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmdPort=${ports[1]}
AuthType=auth/munge
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd.pid
SlurmctldLogFile=$directory/slurmctld.log
SlurmdLogFile=$directory/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
ReturnToService=2
KillWait=10
NodeName=$host NodeAddr=127.0.0.1 CPUs=16 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    if ! munge -n > /dev/null 2>&1; then
        mkdir -p /run/munge && chown munge: /run/munge
        runuser -u munge -- munged || fail "munged does not start: see /var/log/munge/munged.log"
    fi
    export SLURM_CONF=$directory/slurm.conf
    slurmctld -c
    slurmd
    for _ in $(seq 60); do
        if [ "$(sinfo --noheader --format=%T 2> /dev/null)" = idle ]; then
            echo "SLURM runs: export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.5
    done
    stop
    fail "SLURM does not come up: see $directory/slurmctld.log and $directory/slurmd.log"
}

stop() {
    export SLURM_CONF=$directory/slurm.conf
    [ -f "$SLURM_CONF" ] || fail "there is no SLURM in $directory"
    scancel --user="$(id -un)" 2> /dev/null || true
    local daemon pid
    for daemon in slurmd slurmctld; do
        [ -f "$directory/$daemon.pid" ] || continue
        pid=$(cat "$directory/$daemon.pid")
        kill "$pid" 2> /dev/null || continue
        for _ in $(seq 20); do # a slurmd may wait for jobs that do not end
            kill -0 "$pid" 2> /dev/null || break
            sleep 0.2
        done
        kill -9 "$pid" 2> /dev/null || true
    done
}

case $action in
    start | stop) "$action" ;;
    *) fail "say start or stop, and perhaps a directory" ;;
esac

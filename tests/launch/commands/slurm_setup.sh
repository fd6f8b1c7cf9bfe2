#!/bin/bash
# A real SLURM of two nodes on the loopback of this computer, for tests/launch/commands/test_slurm_real.py and for trying things out.
#
#   slurm_setup.sh install         apt-get install slurm-wlm (Debian, Ubuntu; root)
#   slurm_setup.sh start DIR       munged, slurmctld and two slurmd, all their files in DIR; then: export SLURM_CONF=DIR/slurm.conf
#   slurm_setup.sh stop DIR
#
# It needs root, and adds the names of the two nodes to /etc/hosts until it stops.
set -eu
command=${1:-help}
directory=${2:-}
mark="# tiglon's slurm test"

start() {
    mkdir -p "$directory"
    directory=$(realpath "$directory")
    mkdir -p "$directory"/{state,munge,spool-tiglon1,spool-tiglon2}
    chmod 755 "$directory" "$directory/munge"
    grep -q "$mark" /etc/hosts || echo "127.0.0.1 tiglon1 tiglon2 $mark" >>/etc/hosts

    dd if=/dev/urandom of="$directory/munge/key" bs=1 count=1024 status=none
    chmod 400 "$directory/munge/key"
    munged --force --key-file="$directory/munge/key" --socket="$directory/munge/socket" \
        --pid-file="$directory/munge/pid" --log-file="$directory/munge/log" --seed-file="$directory/munge/seed"

    cat >"$directory/slurm.conf" <<EOF
ClusterName=tiglon
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=26817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$directory/munge/socket
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool-%n
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd-%n.pid
SlurmctldLogFile=$directory/slurmctld.log
SlurmdLogFile=$directory/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=5
ReturnToService=2
JobRequeue=1
KillWait=30
NodeName=DEFAULT Sockets=1 CoresPerSocket=2 RealMemory=1500 State=UNKNOWN
NodeName=tiglon1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=27001
NodeName=tiglon2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=27002 Feature=fast
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
    export SLURM_CONF=$directory/slurm.conf
    slurmctld -f "$SLURM_CONF"
    for node in tiglon1 tiglon2; do slurmd -f "$SLURM_CONF" -N "$node"; done # both have the same cores
    for _ in $(seq 60); do
        [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = 2 ] && return 0
        sleep 1
    done
    echo "the nodes did not come up; see $directory/*.log" >&2
    exit 1
}

stop() {
    export SLURM_CONF=$directory/slurm.conf
    scancel --user="$(id -un)" 2>/dev/null || true
    for file in "$directory"/slurmd-*.pid "$directory"/slurmctld.pid "$directory"/munge/pid; do
        [ -f "$file" ] && kill "$(cat "$file")" 2>/dev/null || true
    done
    grep -v "$mark" /etc/hosts >"$directory/hosts" && cat "$directory/hosts" >/etc/hosts
}

case $command in
install) DEBIAN_FRONTEND=noninteractive apt-get install -y -q slurm-wlm munge ;;
start) start ;;
stop) stop ;;
*) sed -n 2,8p "$0" ;;
esac

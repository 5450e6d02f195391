#!/usr/bin/env bash
# Epilog= of slurm.conf (or one of its scripts): on each node, as root, when a job has ended. The agent that prolog.sh
# started is told to stop when its user has no other job here. It delivers first; what it cannot deliver waits in its
# state for the agent of the user's next job on this node.
set -euo pipefail

user=$SLURM_JOB_UID
jobs=${ROOT_FOLDER:-}/run/trackagent-jobs

mkdir -p "$jobs"
exec 9>"$jobs/$user.lock"
flock 9
mkdir -p "$jobs/$user"
rm -f "$jobs/$user/$SLURM_JOB_ID"
rmdir "$jobs/$user" 2>/dev/null || exit 0
systemctl stop "trackagent-$user" || true

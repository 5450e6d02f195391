#!/usr/bin/env bash
# Prolog= of slurm.conf (or one of its scripts): on each node, as root, before a job's first step, an agent for the
# job's user, if none runs here yet. It outlives jobs that are killed, delivers what they leave, and stays until
# epilog.sh ends the user's last one. Jobs say only:
#
#   export TRACKAGENT_STATE=/var/lib/trackagent/$(id -u)
#   srun torchrun ...
#
# Settings for all users' agents, such as TRACKAGENT_STORE, stand in /etc/trackagent/agent.env.
set -euo pipefail

user=$SLURM_JOB_UID group=$SLURM_JOB_GID
jobs=${ROOT_FOLDER:-}/run/trackagent-jobs
state=${ROOT_FOLDER:-}/var/lib/trackagent/$user

umask 022
mkdir -p "$jobs" "${state%/*}"
[ -d "$state" ] || install -d -m 0700 -o "$user" -g "$group" "$state"
# Against the epilog of the user's job before this one.
exec 9>"$jobs/$user.lock"
flock 9
mkdir -p "$jobs/$user"
touch "$jobs/$user/$SLURM_JOB_ID"
unit=trackagent-$user
systemctl is-active --quiet "$unit" && exit 0
# An agent that cannot start holds no job up: the ranks keep their records.
systemd-run --quiet --collect --unit="$unit" --uid="$user" --gid="$group" \
  --property=Restart=always --property=RestartSec=1 --property=TimeoutStopSec=90 --property=NoNewPrivileges=yes \
  --property=EnvironmentFile=-/etc/trackagent/agent.env --property=LimitNOFILE=65536 --property=MemoryMax=1G \
  --setenv=TRACKAGENT_STATE="$state" --setenv=SQLITE_TMPDIR="$state" \
  /opt/trackagent/bin/trackagent start || echo "trackagent: no agent for user $user on $(hostname)" >&2

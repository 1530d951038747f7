#!/usr/bin/env bash
# Process 1 of the lab, in network, mount, pid and host name namespaces of its own: starts the daemons, then waits for the end of its
# standard input. When it ends, for whatever reason, the kernel ends everything that runs in here.
#     lab_init.sh BASE NODES
set -euo pipefail
base=$1 nodes=$2
export SLURM_CONF=$base/slurm.conf

hostname ctl
ip link set lo up
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/munge
printf '127.0.0.1 localhost\n10.77.0.1 ctl\n' >"$base/hosts"
for i in $(seq "$nodes"); do echo "10.77.0.$((10 + i)) n$i"; done >>"$base/hosts"
mount --bind "$base/hosts" /etc/hosts
ip link add br0 type bridge
ip addr add 10.77.0.1/24 dev br0
ip link set br0 up
for g in 0 1 2 3; do mknod "$base/gpu$g" c 1 3; done  # GPUs for Slurm to hand out: copies of /dev/null

munged --force --key-file="$base/munge.key" --socket=/run/munge/sock --pid-file=/run/munge/pid --log-file="$base/log/munged.log" \
  --seed-file=/run/munge/seed
slurmctld -c
for i in $(seq "$nodes"); do
  ip netns add "n$i"
  ip link add "v$i" type veth peer name eth0 netns "n$i"
  ip link set "v$i" master br0 up
  ip -n "n$i" link set lo up
  ip -n "n$i" addr add "10.77.0.$((10 + i))/24" dev eth0
  ip -n "n$i" link set eth0 up
  # Not `ip netns exec`: it mounts /sys anew, and slurmd ends without its cgroup folder.
  # shellcheck disable=SC2016
  nsenter --net="/run/netns/n$i" unshare --uts bash -c 'hostname "$1"; exec slurmd -N "$1"' - "n$i"
done
for _ in $(seq 300); do
  [[ $(sinfo --noheader --partition=low --states=idle --format=%D 2>/dev/null) == "$nodes" ]] && { touch "$base/ready"; break; }
  sleep 0.1
done
cat >/dev/null

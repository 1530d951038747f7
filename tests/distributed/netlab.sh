#!/usr/bin/env bash
# Two hosts h1 and h2 (network and UTS namespaces) on a private bridge, 10.78.0.K: netlab.sh up | on K CMD... | cut K | join K | down
# Everything lives in $NETLAB and in the processes of one namespace, which `down` ends.
set -euo pipefail
BASE=$NETLAB N=2
inside() { nsenter -t "$(cat "$BASE/init.pid")" -n -m -p --wdns="$PWD" -- "$@"; }
case ${1:-} in
up) mkdir -p "$BASE"
  setsid unshare --net --mount --pid --fork --kill-child --mount-proc "$0" _init >"$BASE/log" 2>&1 </dev/null & echo $! >"$BASE/unshare.pid"
  for _ in $(seq 100); do [ -e "$BASE/ready" ] && break; kill -0 "$!" 2>/dev/null || break; sleep 0.05; done
  [ -e "$BASE/ready" ] || { cat "$BASE/log"; exit 1; }
  pgrep -P "$!" >"$BASE/init.pid" ;;
_init) ip link set lo up; mount -t tmpfs tmpfs /run; ip link add br0 type bridge; ip addr add 10.78.0.254/24 dev br0; ip link set br0 up
  { echo "127.0.0.1 localhost"; for k in $(seq "$N"); do echo "10.78.0.$k h$k"; done; } >"$BASE/hosts"; mount --bind "$BASE/hosts" /etc/hosts
  for k in $(seq "$N"); do
    ip netns add "h$k"; ip link add "v$k" type veth peer name eth0 netns "h$k"; ip link set "v$k" master br0 up
    ip -n "h$k" link set lo up; ip -n "h$k" addr add "10.78.0.$k/24" dev eth0; ip -n "h$k" link set eth0 up
  done; : >"$BASE/ready"; while :; do sleep 3600 & wait; done ;;
on) k=$2; shift 2; inside nsenter --net="/run/netns/h$k" unshare --uts sh -c 'hostname "$0"; exec "$@"' "h$k" "$@" ;;
cut) inside ip link set "v$2" down ;;
join) inside ip link set "v$2" up ;;
down) kill -9 "$(cat "$BASE/unshare.pid")" 2>/dev/null || true ;;
esac

#!/bin/sh
# Runs a script on ranks of two pretended nodes: two network namespaces, joined by a link of a given rate per direction.
#
#     benchmarks/exchange/slow_link.sh RATE RANKS COMMAND...      e.g. benchmarks/exchange/slow_link.sh 1gbit 4 .venv/bin/python x.py
#
# The first half of the ranks is on one node, the rest on the other. Ranks of a node talk over its loopback. Needs root,
# iproute2 and the kernel's tbf queue. Only the rate is shaped: the link's latency is that of a veth pair.
set -eu
if [ "${SLOW_LINK_INSIDE:-}" != 1 ]; then
    SLOW_LINK_INSIDE=1 exec unshare -n "$0" "$@"
fi
rate=$1 ranks=$2
shift 2
unshare -n sleep 100000 &
other=$!
trap 'kill $other' EXIT
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/$$/ns/net)" ]; do sleep 0.1; done
there() { nsenter -t "$other" -n "$@"; }

ip link set lo up
there ip link set lo up
ip link add here type veth peer name there netns "$other"
ip addr add 10.99.0.1/24 dev here
there ip addr add 10.99.0.2/24 dev there
ip link set here up
there ip link set there up
tc qdisc add dev here root tbf rate "$rate" burst 256kb limit 64mb
there tc qdisc add dev there root tbf rate "$rate" burst 256kb limit 64mb

export WORLD_SIZE="$ranks" MASTER_ADDR=10.99.0.1 MASTER_PORT=29511 OMP_NUM_THREADS=1
pids=""
rank=0
while [ "$rank" -lt "$ranks" ]; do
    if [ "$rank" -lt $((ranks / 2)) ]; then
        RANK=$rank LOCAL_RANK=$rank GLOO_SOCKET_IFNAME=here "$@" &
    else
        RANK=$rank LOCAL_RANK=$((rank - ranks / 2)) GLOO_SOCKET_IFNAME=there there "$@" &
    fi
    pids="$pids $!"
    rank=$((rank + 1))
done
for pid in $pids; do wait "$pid"; done

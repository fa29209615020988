#!/usr/bin/env bash
# One Ray node in the foreground: the head of a new cluster, or a node that joins it. Ctrl-C or SIGTERM ends it.
#
#   start_node.sh head
#   start_node.sh worker HEAD_IP[:PORT]
#
# `ray` must be on PATH: activate the environment in which ca2st is installed, the same on every node.
# Settings, all by environment variables:
#   NODE_IP              this node's address as the others reach it (default: found by the route to the head,
#                        on the head the first address of `hostname -I`)
#   RAY_PORT             the head's port (6379)
#   DASHBOARD            true: the head serves the dashboard and takes `ca2st submit` on 127.0.0.1:8265 (true)
#   NUM_CPUS, NUM_GPUS   what Ray may use here (default: all it finds)
#   TEMP_DIR             sockets and logs; keep it short, socket paths have at most 107 characters (/tmp/ray)
#   RAY_AUTH_TOKEN_PATH  the cluster's token (~/.ray/auth_token); the head makes a missing one, the others need a copy
#                        (RAY_AUTH_TOKEN, where it is set, is the token itself and no file is read)
set -euo pipefail

fail() {
  echo "start_node.sh: $*" >&2
  exit 2
}

role=${1:-}
head_address=${2:-}
port=${RAY_PORT:-6379}
case "$role:$#" in
  head:1) ;;
  worker:2) [[ $head_address == *:* ]] || head_address="$head_address:$port" ;;
  *) fail "expected 'head' or 'worker HEAD_IP[:PORT]', found '$*'" ;;
esac
command -v ray >/dev/null || fail "ray is not on PATH; activate the environment in which ca2st is installed"

# Everything is refused without the token: whoever may talk to a Ray cluster may run any code on it.
if [[ -z ${RAY_AUTH_TOKEN:-} ]]; then
  token=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
  if [[ $role == head && ! -e $token ]]; then
    mkdir -p "$(dirname "$token")"
    (umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$token")
    echo "start_node.sh: made the cluster's token $token; copy it to the other nodes, readable by you alone" >&2
  fi
  [[ -s $token ]] || fail "$token: expected the head's token, found nothing; copy it from the head (chmod 600)"
  [[ -z $(find -L "$token" -perm /077) ]] || fail "$token: others may read it; chmod 600 $token"
  export RAY_AUTH_TOKEN_PATH=$token
fi
export RAY_AUTH_MODE=token

if [[ -z ${NODE_IP:-} ]]; then
  if [[ $role == worker ]]; then
    NODE_IP=$(ip -4 -o route get "${head_address%:*}" | sed -n 's/.* src \([0-9.]*\).*/\1/p')
  else
    NODE_IP=$(hostname -I | cut -d ' ' -f 1)
  fi
  [[ -n $NODE_IP ]] || fail "found no address of this node; set NODE_IP"
fi

case "$NODE_IP" in
  127.* | localhost)
    echo "start_node.sh: NODE_IP=$NODE_IP: Ray takes the address by which this machine reaches others instead, and its" \
      "ports are open there; what asks for the node needs that address, which \`ray start\` prints as local node IP" >&2
    ;;
esac

# Where a host's name stands for a loopback address, as on Debian, gloo would look for its peers on this machine only.
interface=$(ip -4 -o addr show to "$NODE_IP" | head -n 1 | sed 's/^[0-9]*: *\([^ @]*\).*/\1/')
[[ -n $interface ]] || fail "NODE_IP=$NODE_IP: no interface of this machine has this address"
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}

options=(--node-ip-address "$NODE_IP" --disable-usage-stats --block)
[[ -z ${NUM_CPUS:-} ]] || options+=(--num-cpus "$NUM_CPUS")
[[ -z ${NUM_GPUS:-} ]] || options+=(--num-gpus "$NUM_GPUS")
[[ -z ${TEMP_DIR:-} ]] || options+=(--temp-dir "$TEMP_DIR")
if [[ $role == head ]]; then
  exec ray start --head --port "$port" --dashboard-host 127.0.0.1 --include-dashboard "${DASHBOARD:-true}" "${options[@]}"
fi
exec ray start --address "$head_address" "${options[@]}"

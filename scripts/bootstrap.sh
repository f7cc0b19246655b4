#!/usr/bin/env bash
# Installs what kiln needs from Debian packages, and checks for Rust and Go. The only step that needs root.
# Usage: scripts/bootstrap.sh [--test]    --test also installs what the test suite compares itself with.
#
# Writes nothing outside the checkout but packages: apt's words go to target/set-up.log, the names of packages that were
# installed here to target/installed-packages (`make uninstall` says them). May be stopped and started again at any moment.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '%skiln set-up:%s %s\n' "$bold" "$plain" "$*" >&2; }
fail() {
  printf 'kiln set-up: %s\n' "$*" >&2
  exit 2
}
bold='' plain=''
[ -t 2 ] && [ -z "${NO_COLOR:-}" ] && bold=$'\033[1m' plain=$'\033[0m'

[ -r /etc/os-release ] || fail "this script knows Debian 12 and 13; see docs/guides/install.md for the list of packages"
# shellcheck disable=SC1091
. /etc/os-release
case "${VERSION_CODENAME:-}" in
  bookworm | trixie) ;;
  *) fail "this script knows Debian 12 and 13, not ${PRETTY_NAME:-this system}; see docs/guides/install.md" ;;
esac
[ "$(uname -m)" = x86_64 ] || fail "kiln runs on x86-64 hosts, not on $(uname -m)"

state=${CARGO_TARGET_DIR:-target}
mkdir -p "$state"
log=$state/set-up.log scratch=''

# Marks a policy-rc.d of ours, so that one that a kill left behind is known and goes.
readonly MARK='kiln set-up: no service starts while packages are installed'
cleanup() {
  [ -z "$scratch" ] || root rm -rf "$scratch"
  if grep -qsF "$MARK" /usr/sbin/policy-rc.d; then root rm -f /usr/sbin/policy-rc.d; fi
}
root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else
    fail "installing packages needs root: run this once as root, or install sudo"
  fi
}

# One line for what apt-get does now, from its status lines (README.progress-reporting of apt); the rest goes to the log.
show_progress() {
  local line kind percent words shown=-9
  while IFS= read -r line; do
    case "$line" in dlstatus:* | pmstatus:*) ;; *)
      printf '%s\n' "$line" >>"$log"
      continue
      ;;
    esac
    IFS=: read -r kind _ percent words <<<"$line"
    case "$kind" in dlstatus) kind='download' ;; *) kind='install' ;; esac
    if [ -t 2 ]; then
      printf '\r\033[K   %s %3.0f %% %.60s' "$kind" "$percent" "$words" >&2
    elif [ $((SECONDS - shown)) -ge 5 ]; then
      printf '   %s %3.0f %% %s\n' "$kind" "$percent" "$words" >&2
      shown=$SECONDS
    fi
  done
  if [ -t 2 ]; then printf '\r\033[K' >&2; fi
}
apt_options=(-q -y -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 -o APT::Status-Fd=3 -o APT::Keep-Downloaded-Packages=false)
apt() {
  printf '\n# apt-get %s\n' "$*" >>"$log"
  # Not descriptor 1: apt closes its status descriptor for dpkg, and scripts of packages fail without a standard output. Opened
  # behind sudo, which closes what it does not know.
  # shellcheck disable=SC2016
  if ! root env DEBIAN_FRONTEND=noninteractive sh -c 'exec apt-get "$@" 3>&1 2>&1 </dev/null' apt-get "${apt_options[@]}" "$@" | show_progress; then
    tail -n 15 "$log" >&2
    return 1
  fi
}
updated=''
apt_update() {
  [ -z "$updated" ] || return 0
  apt update || fail "apt-get update failed (above, and in $log): is the network there? Run this again to go on"
  updated=yes
}
# Takes packages from this release alone, when it is named.
release=()
install_packages() {
  apt_update
  printf '%s\n' "$@" >>"$state/installed-packages"
  apt install --no-install-recommends "${release[@]}" "$@"
}

packages=(qemu-system-x86 qemu-utils mmdebstrap e2fsprogs zstd xz-utils ca-certificates uidmap git make gcc libc6-dev)
[ "${1:-}" = --test ] && packages+=(skopeo docker-registry podman openssh-client postgresql openssl python3 python3-venv sudo)

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
qemu_new_enough() {
  command -v qemu-system-x86_64 >/dev/null || return 1
  local version
  version=$(qemu-system-x86_64 --version | sed -nE '1s/.*version ([0-9]+)\.([0-9]+).*/\1 \2/p')
  # shellcheck disable=SC2086
  set -- $version
  [ "${1:-0}" -gt 8 ] || { [ "${1:-0}" -eq 8 ] && [ "${2:-0}" -ge 2 ]; }
}
at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }
rust_version() { rustc --version 2>/dev/null | awk '{sub(/-.*/, "", $2); print $2}'; }
rust_ok() { command -v cargo >/dev/null && at_least 1.95.0 "$(rust_version)"; }
# In a folder without go.mod, so that no toolchain is fetched to answer.
go_version() { (cd / && go env GOVERSION 2>/dev/null) | sed -E 's/^go//'; }
go_ok() { command -v go >/dev/null && at_least 1.21 "$(go_version)"; }

# Debian 12's own QEMU lacks file: migration and its Go is too old: backports have both. They are used for this installation
# alone, from the mirror this host uses, unless the host has them among its sources.
use_backports() {
  release=(-t bookworm-backports)
  [ -z "$scratch" ] || return 0
  local indexes site
  # Without lists apt does not say where they come from.
  apt_update
  indexes=$(apt-get indextargets --format '$(SITE)|$(RELEASE)' 'Created-By: Packages' 2>/dev/null || true)
  if grep -q '|bookworm-backports$' <<<"$indexes"; then return; fi
  site=$(sed -n 's/|bookworm$//p' <<<"$indexes" | head -n 1)
  [ -n "$site" ] || fail "no Debian 12 mirror is configured in /etc/apt"
  say "Debian's backports are used for this installation only; add them to /etc/apt to get their updates"
  scratch=$(mktemp -d)
  chmod 755 "$scratch"
  mkdir -p "$scratch/sources" "$scratch/lists/partial"
  cp -a /etc/apt/sources.list.d/. "$scratch/sources/" 2>/dev/null || true
  printf 'deb %s bookworm-backports main\n' "$site" >"$scratch/sources/kiln-backports.list"
  apt_options+=(-o "Dir::Etc::SourceParts=$scratch/sources" -o "Dir::State::Lists=$scratch/lists")
  updated=''
}

# Before the first package is installed.
begun=''
begin() {
  [ -z "$begun" ] || return 0
  begun=yes
  root true
  trap cleanup EXIT
  trap 'exit 130' INT TERM HUP
  : >"$log"
  # A run that was stopped in the middle of an installation left packages half-way.
  root dpkg --configure -a >>"$log" 2>&1 </dev/null || true
}

if [ "${#missing[@]}" -gt 0 ] || ! qemu_new_enough; then
  begin
  say "installing ${missing[*]:-a newer QEMU} (about a minute; $log has apt's words)"
  if [ "$VERSION_CODENAME" = bookworm ] && ! qemu_new_enough; then use_backports; fi
  if [ "${1:-}" = --test ] && [ ! -e /usr/sbin/policy-rc.d ]; then
    # The test suite starts its own registry; the packaged service must not take a port.
    printf '#!/bin/sh\n# %s\nexit 101\n' "$MARK" | root tee /usr/sbin/policy-rc.d >/dev/null
    root chmod 755 /usr/sbin/policy-rc.d
  fi
  qemu=() rest=()
  for package in "${missing[@]}"; do
    case "$package" in qemu-*) qemu+=("$package") ;; *) rest+=("$package") ;; esac
  done
  qemu_new_enough || qemu=(qemu-system-x86 qemu-utils)
  [ "${#qemu[@]}" -eq 0 ] || install_packages "${qemu[@]}" || fail "QEMU could not be installed (above)"
  release=()
  [ "${#rest[@]}" -eq 0 ] || install_packages "${rest[@]}" || fail "packages could not be installed (above)"
fi
qemu_new_enough || fail "QEMU 8.2 or newer is needed; found: $(qemu-system-x86_64 --version 2>&1 | head -n 1)"

if ! rust_ok; then
  say "Rust 1.95 or newer is not on PATH: installing Debian's rustc-web and cargo-web"
  begin
  release=()
  install_packages rustc-web cargo-web || fail "no new enough Rust: install it with rustup (https://rustup.rs), then run this again"
  rust_ok || fail "rustc $(rust_version) is too old: install Rust 1.95 or newer with rustup"
fi
if [ "${1:-}" = --test ] && ! { cargo fmt --version && cargo clippy --version; } >/dev/null 2>&1; then
  case "$(command -v rustc)" in
    /usr/bin/rustc)
      say "installing Debian's rustfmt-web and rust-web-clippy"
      begin
      install_packages rustfmt-web rust-web-clippy || fail "rustfmt and clippy could not be installed (above)"
      ;;
    *) fail "the tests need rustfmt and clippy: rustup component add rustfmt clippy" ;;
  esac
fi
if ! go_ok; then
  say "Go 1.21 or newer is not on PATH: installing Debian's (it fetches the exact toolchain as a module)"
  begin
  [ "$VERSION_CODENAME" != bookworm ] || use_backports
  install_packages golang-go || fail "no new enough Go: install Go 1.21 or newer"
  go_ok || fail "no new enough Go: install Go 1.21 or newer"
fi
say "system packages are there: $(qemu-system-x86_64 --version | sed -n '1s/ (.*//p'), rustc $(rust_version), go $(go_version)"

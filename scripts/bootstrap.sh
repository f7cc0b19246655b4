#!/usr/bin/env bash
# Installs what kiln needs from Debian packages, and checks for Rust and Go. The only step that needs root.
# Usage: scripts/bootstrap.sh [--test]    --test also installs what the test suite compares itself with.
set -euo pipefail

say() { printf '\033[1mkiln set-up:\033[0m %s\n' "$*" >&2; }
fail() { printf 'kiln set-up: %s\n' "$*" >&2; exit 2; }

[ -r /etc/os-release ] || fail "this script knows Debian 12 and 13; see docs/guides/install.md for the list of packages"
# shellcheck disable=SC1091
. /etc/os-release
case "${VERSION_CODENAME:-}" in
  bookworm | trixie) ;;
  *) fail "this script knows Debian 12 and 13, not ${PRETTY_NAME:-this system}; see docs/guides/install.md" ;;
esac
[ "$(uname -m)" = x86_64 ] || fail "kiln runs on x86-64 hosts, not on $(uname -m)"

packages=(qemu-system-x86 qemu-utils mmdebstrap e2fsprogs zstd xz-utils ca-certificates uidmap git make gcc libc6-dev curl)
[ "${1:-}" = --test ] && packages+=(skopeo docker-registry)

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

root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else
    fail "installing packages needs root: run this once as root, or install sudo"
  fi
}
apt() { root env DEBIAN_FRONTEND=noninteractive apt-get -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 -qq "$@"; }

if [ "${#missing[@]}" -gt 0 ] || ! qemu_new_enough; then
  say "installing ${missing[*]:-a newer QEMU} (about a minute)"
  # The test suite starts its own registry; the packaged service must not take a port.
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' | root tee /usr/sbin/policy-rc.d >/dev/null
    root chmod 755 /usr/sbin/policy-rc.d
    trap 'root rm -f /usr/sbin/policy-rc.d' EXIT
  fi
  apt update
  release=()
  if [ "$VERSION_CODENAME" = bookworm ] && ! qemu_new_enough; then
    # QEMU 7.2 of Debian 12 lacks file: migration; the newer one is in backports, on the mirror this host already uses.
    if ! apt-cache policy | grep -q bookworm-backports; then
      uri=$(apt-get indextargets --format '$(SITE)|$(CODENAME)' 'Created-By: Packages' 2>/dev/null | sed -n 's/|bookworm$//p' | head -n 1)
      [ -n "$uri" ] || fail "no Debian 12 mirror is configured in /etc/apt"
      printf 'deb %s bookworm-backports main\n' "$uri" | root tee /etc/apt/sources.list.d/kiln-backports.list >/dev/null
      apt update
    fi
    release=(-t bookworm-backports)
  fi
  qemu=() rest=()
  for package in "${missing[@]}"; do
    case "$package" in qemu-*) qemu+=("$package") ;; *) rest+=("$package") ;; esac
  done
  qemu_new_enough || qemu=(qemu-system-x86 qemu-utils)
  [ "${#qemu[@]}" -eq 0 ] || apt install -y --no-install-recommends "${release[@]}" "${qemu[@]}"
  [ "${#rest[@]}" -eq 0 ] || apt install -y --no-install-recommends "${rest[@]}"
fi
qemu_new_enough || fail "QEMU 8.2 or newer is needed; found: $(qemu-system-x86_64 --version 2>&1 | head -n 1)"

at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }
rust=$(rustc --version 2>/dev/null | awk '{print $2}' || true)
if [ -z "$rust" ] || ! at_least 1.95.0 "${rust%%-*}"; then
  say "Rust 1.95 or newer is not on PATH: installing Debian's rustc-web and cargo-web"
  apt update
  apt install -y --no-install-recommends rustc-web cargo-web || fail "no new enough Rust: install it with rustup (https://rustup.rs), then run this again"
  rust=$(rustc --version 2>/dev/null | awk '{print $2}' || true)
  at_least 1.95.0 "${rust%%-*}" || fail "rustc ${rust:-none} is too old: install Rust 1.95 or newer with rustup"
fi
go_ok() { command -v go >/dev/null && at_least 1.21 "$(go env GOVERSION 2>/dev/null | sed -E 's/^go//')"; }
if ! go_ok; then
  say "Go 1.21 or newer is not on PATH: installing Debian's (it fetches the exact toolchain as a module)"
  apt update
  if [ "$VERSION_CODENAME" = bookworm ]; then
    apt install -y --no-install-recommends -t bookworm-backports golang-go || apt install -y --no-install-recommends golang-go
  else
    apt install -y --no-install-recommends golang-go
  fi
  go_ok || fail "no new enough Go: install Go 1.21 or newer"
fi
say "system packages are there: $(qemu-system-x86_64 --version | head -n 1), rustc $rust, $(go env GOVERSION)"

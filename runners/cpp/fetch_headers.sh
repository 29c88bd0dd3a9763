#!/bin/sh
# Fetches the headers of ONNX Runtime's C API (MIT) by apt, without installing anything.
#
#   runners/cpp/fetch_headers.sh FOLDER
#
# They lie in FOLDER/usr/include/onnxruntime afterwards. Debian has packaged them since trixie
# (libonnxruntime-dev); on an older Debian the package is taken from there, over a list of its own,
# so that the system's lists stay as they are. Any later library serves a header: the C API keeps
# its older versions.
set -eu
if [ $# -ne 1 ]; then
  echo "usage: $0 FOLDER" >&2
  exit 2
fi
folder=$(mkdir -p "$1" && cd "$1" && pwd)
[ -e "$folder/usr/include/onnxruntime/onnxruntime_cxx_api.h" ] && exit 0

suite=trixie
keys=/usr/share/keyrings/debian-archive-keyring.gpg
mirror=$(apt-get indextargets --format '$(SITE)' 'Origin: Debian' 'Label: Debian' | head -n 1)
mirror=${mirror:-${DEBIAN_MIRROR:-}}
if [ -z "$mirror" ]; then
  echo "$0: apt knows no mirror of Debian; run apt-get update on a Debian, or name one in DEBIAN_MIRROR" >&2
  exit 2
fi
if [ ! -e "$keys" ]; then
  echo "$0: $keys is missing; install debian-archive-keyring, or take the headers of any release" \
    "of ONNX Runtime" >&2
  exit 2
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
echo "deb [signed-by=$keys] $mirror $suite main" > "$work/sources.list"
own_lists() {
  apt-get -qq -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" \
    -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- \
    -o APT::Sandbox::User=root "$@"
}
own_lists update
(cd "$work" && own_lists download libonnxruntime-dev)
dpkg-deb --extract "$work"/libonnxruntime-dev_*.deb "$folder"

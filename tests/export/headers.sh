#!/usr/bin/env bash
# ONNX Runtime's C headers into the folder $1, for the C++ example. The pip package has the library
# without headers; Debian has them, and any later library takes what older headers ask for. Needs
# apt, no root, and installs nothing.
set -euo pipefail
package=libonnxruntime-dev suite=trixie
to=$(realpath -m "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

options=(-qq -o "APT::Sandbox::User=$(id -un)")
if ! apt-get "${options[@]}" download $package 2>/dev/null; then
    # an older system: the same mirror has newer ones
    mirror=$(apt-get indextargets --format '$(SITE)' 'Origin: Debian' | head -1)
    test -n "$mirror" || { echo "no $package here, and no Debian mirror is known" >&2; exit 1; }
    mkdir -p lists/partial cache/archives/partial
    keys=/usr/share/keyrings/debian-archive-keyring.gpg
    echo "deb [signed-by=$keys] $mirror $suite main" >sources
    options+=(-o "Dir::Etc::SourceList=$work/sources" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache")
    apt-get "${options[@]}" update
    apt-get "${options[@]}" download $package
fi
dpkg-deb -x $package*.deb .
mkdir -p "$to"
cp -r usr/include/onnxruntime/. "$to"

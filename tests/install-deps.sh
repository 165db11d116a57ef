#!/bin/sh
# Installs what the tests need and the machine lacks; run by `make test`. Does nothing the second time.
#   tests/install-deps.sh build  a C linker
#   tests/install-deps.sh linux  for stock Linux as well: QEMU, which emulates a host for it, and ext4's tools
#   tests/install-deps.sh test   binutils, clients and servers of NBD, Python's QMP client and kernels of others (in target/) as well
#   tests/install-deps.sh bench  as for linux: QEMU is also what the benchmark compares with; and a newer one
#                                from Debian's backports, unpacked in target/qemu-newer, where there is one
set -eu
what=${1:-test}
cd "$(dirname "$0")/.."

if ! command -v cargo >/dev/null; then
    echo "cargo is missing: install Rust 1.89 or later, see https://rustup.rs" >&2
    exit 1
fi

need() { command -v "$1" >/dev/null || packages="$packages $2"; }
# Sets `packages` to what is missing.
look() {
    packages=
    need cc gcc
    case "$what" in
    linux | test | bench)
        need qemu-system-x86_64 qemu-system-x86
        need mke2fs e2fsprogs
        ;;
    esac
    case "$what" in
    test | bench) need qemu-nbd qemu-utils ;;
    esac
    case "$what" in
    test)
        need objdump binutils
        need python3 python3
        need prove perl
        need nbdcopy libnbd-bin
        need nbdkit nbdkit
        # Debian has venv apart from Python.
        python3 -c 'import venv, ensurepip' 2>/dev/null || packages="$packages python3-venv"
        ;;
    esac
}

install() {
    # Their names are Debian's and Ubuntu's.
    if ! command -v apt-get >/dev/null; then
        echo "please install:$packages" >&2
        exit 1
    fi
    sudo=
    if [ "$(id -u)" != 0 ]; then
        sudo=sudo
        # Without a terminal, nobody can be asked for a password.
        if ! sudo -n true 2>/dev/null && ! { command -v sudo >/dev/null && [ -t 0 ]; }; then
            echo "only root can install what is missing: apt-get install$packages" >&2
            exit 1
        fi
    fi
    $sudo apt-get update -qq
    # shellcheck disable=SC2086 # a list of packages
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages
}

# ext4's tools may lie where only root looks.
PATH=$PATH:/usr/sbin:/sbin
# Twice, since apt may remove one that is there in another version than the others: QEMU's tools from backports.
for _ in 1 2; do
    look
    if [ -n "$packages" ]; then install; fi
done

venv=target/qmp-venv
if [ "$what" = test ] && ! "$venv/bin/python" -c 'import qemu.qmp' 2>/dev/null; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check qemu.qmp==0.0.6
fi

# Kernels of others, unpacked and not installed; their tests are skipped where Debian's packages are not to be had.
foreign=target/foreign-kernels
if [ "$what" = test ] && [ ! -e "$foreign/boot/ipxe.lkrn" ] && command -v apt-get >/dev/null && command -v dpkg >/dev/null; then
    mkdir -p "$foreign/debs"
    if (cd "$foreign/debs" && apt-get download -qq memtest86+ ipxe grub-invaders grub-coreboot-bin); then
        for deb in "$foreign"/debs/*.deb; do dpkg -x "$deb" "$foreign"; done
    else
        echo "no kernels of others to test with" >&2
    fi
fi

# Without it the benchmark has a column less.
newer=target/qemu-newer
if [ "$what" = bench ] && [ ! -x "$newer/usr/bin/qemu-system-x86_64" ] && grep -qs '^ID=debian' /etc/os-release; then
    # shellcheck source=/dev/null
    . /etc/os-release
    mkdir -p "$newer/lists/partial" "$newer/cache" "$newer/debs"
    folder=$(cd "$newer" && pwd)
    # A list of sources and a cache of their own: the system's stay as they are.
    echo "deb http://deb.debian.org/debian $VERSION_CODENAME-backports main" >"$folder/sources.list"
    apt="apt-get -qq -o Dir::Etc::sourcelist=$folder/sources.list -o Dir::Etc::sourceparts=/dev/null
        -o Dir::State::lists=$folder/lists -o Dir::Cache=$folder/cache"
    # shellcheck disable=SC2086 # options
    if $apt update && (cd "$newer/debs" && $apt download qemu-system-x86 qemu-system-common qemu-system-data); then
        for deb in "$newer"/debs/*.deb; do dpkg -x "$deb" "$newer"; done
        # The libraries are those of the installed one.
        "$newer/usr/bin/qemu-system-x86_64" --version >/dev/null || rm -rf "$newer/usr"
    fi
    [ -x "$newer/usr/bin/qemu-system-x86_64" ] || echo "no newer QEMU in $VERSION_CODENAME-backports to compare with" >&2
fi

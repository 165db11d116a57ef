#!/bin/bash
# Runs test kernels under the QEMU that it finds, as scripts of kernel projects do; `qemu_cli.rs` puts Ferry in its
# place. It knows QEMU only: which version it is, which devices it lists, what a missing kernel looks like, what its
# exit codes mean, and that words on standard error other than warnings are its failures.
#   usage: qemu_runner.bash < LINES; each is: NAME TIMEOUT KERNEL OPTION…
set -u

find_qemu() {
    local candidate
    for candidate in ${QEMU:-qemu-system-x86_64 qemu-kvm}; do
        if "$candidate" --help 2>/dev/null | grep -q QEMU; then
            command -v "$candidate"
            return
        fi
    done
    echo "no QEMU was found" >&2
    exit 2
}

qemu=$(find_qemu) || exit
read -r major _ < <("$qemu" --version | sed -n 's/.*version \([0-9]*\)\.\([0-9]*\).*/\1 \2/p')
if ((major < 3)); then
    echo "this QEMU is too old" >&2
    exit 2
fi

devices=$("$qemu" -device '?' 2>&1)
options=(-no-reboot -nodefaults -vnc none -serial stdio -machine accel=kvm)
if grep -q '"pc-testdev"' <<<"$devices"; then
    options+=(-device pc-testdev -device isa-debug-exit,iobase=0xf4,iosize=0x4)
else
    echo "this QEMU has no test device" >&2
    exit 2
fi
if grep -q '"pci-testdev"' <<<"$devices"; then
    options+=(-device pci-testdev)
fi

# The result of one test, as a word and what is known of it.
result() {
    local timeout=$1 kernel=$2 log errors code
    shift 2
    # Whether anything but the kernel would be wrong.
    log=$("$qemu" "${options[@]}" -kernel _NO_SUCH_KERNEL_ "$@" 2>&1)
    if ! grep _NO_SUCH_KERNEL_ <<<"$log" | grep -q -e '[Cc]ould not \(load\|open\) kernel' -e 'failed to load'; then
        echo "SKIP ${log##*$'\n'}"
        return
    fi
    exec 3>&1
    errors=$(timeout -k 1s --foreground "$timeout" "$qemu" "${options[@]}" -kernel "$kernel" "$@" 2>&1 >&4 </dev/null)
    code=$?
    exec 3>&-
    if ((code == 1)) && grep -qvi warning <<<"${errors:-warning}"; then
        echo "FAIL QEMU said: $errors"
    elif ((code == 1)); then
        echo PASS
    elif ((code == 124)); then
        echo "FAIL timeout"
    elif ((code == 134)); then
        echo "FAIL aborted"
    else
        echo "FAIL exit $code"
    fi
}

# What guests print.
exec 4>&2
while read -r name timeout kernel line; do
    # The options may have quotes in them.
    eval "words=($line)"
    echo "$name: $(result "$timeout" "$kernel" "${words[@]}")"
done

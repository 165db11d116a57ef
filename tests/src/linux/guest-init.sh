#!/bin/busybox sh
# The whole user space of the Linux guest. The kernel turns work=... on its command line into a variable.
# Lines that begin with a word in capitals are what the test reads.
echo "INIT"
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
stty -echo </dev/console
for module in /modules/*; do insmod "$module" || echo "WRONG no $module"; done

uptime() { cut -d' ' -f1 /proc/uptime; }
sum() { sha256sum <"$1"; }
clock() { cat /sys/devices/system/clocksource/clocksource0/current_clocksource; }

finish() {
    umount /mnt || echo "WRONG still mounted"
    dmesg | grep -iE 'lockup|stall|hung|I/O error|EXT4-fs (error|warn)|unstable|BUG:|WARNING:|Oops|unexpected|not responding|spurious|nobody cared' |
        sed 's/^/COMPLAINT /'
    echo "END cpus=$(nproc) clock=$(clock) uptime=$(uptime)"
    "$@" -f
}

echo "SHELL uptime=$(uptime) cpus=$(nproc) clock=$(clock)"
mount -t ext4 /dev/vda /mnt || echo "WRONG no root disk"
(cd /mnt && sha256sum -c -s seed.sha256) || echo "WRONG seed"

case "$work" in
boot)
    cp /mnt/seed /mnt/copy
    finish poweroff
    ;;
reboot)
    if [ -e /mnt/mark ]; then
        echo "AGAIN"
        finish poweroff
    fi
    touch /mnt/mark
    echo "REBOOTING"
    finish reboot
    ;;
cpu)
    flags() { echo "FLAGS $1 $(grep -m1 '^flags' /proc/cpuinfo | cut -d: -f2) ."; }
    flags before
    read -r line </dev/console
    flags after
    finish poweroff
    ;;
button)
    for device in /sys/class/input/event*; do
        if [ "$(cat "$device/device/name")" = "Power Button" ]; then exec 3<"/dev/input/${device##*/}"; fi
    done
    echo "READY"
    # A press is four events of 24 bytes: down, its report, up, its report.
    for press in 1 2; do
        echo "BUTTON $press $(dd bs=24 count=4 <&3 2>/dev/null | od -An -v -w24 -tx1 -j16 | cut -c1-72 | tr -d '\n')"
    done
    finish poweroff
    ;;
churn)
    # Truth lies in RAM: a file that stays as it is, and one that random writes change on both sides.
    dd if=/dev/urandom of=/tmp/still bs=64k count=128 2>/dev/null
    still=$(sum /tmp/still)
    dd if=/dev/urandom of=/tmp/truth bs=64k count=32 2>/dev/null
    cp /tmp/truth /mnt/random
    (read -r line </dev/console && echo "$line" >/tmp/stop) &
    round=0
    until [ -e /tmp/stop ]; do
        dd if=/dev/urandom of=/tmp/whole bs=64k count=16 2>/dev/null
        cp /tmp/whole /mnt/whole
        for write in 1 2 3 4 5 6 7 8; do
            at=$((RANDOM % 512))
            dd if=/dev/urandom of=/tmp/block bs=4k count=1 2>/dev/null
            dd if=/tmp/block of=/tmp/truth bs=4k seek=$at conv=notrunc 2>/dev/null
            dd if=/tmp/block of=/mnt/random bs=4k seek=$at conv=notrunc,fsync 2>/dev/null
        done
        sync
        echo 3 >/proc/sys/vm/drop_caches
        [ "$(sum /tmp/whole)" = "$(sum /mnt/whole)" ] || echo "WRONG whole in round $round"
        [ "$(sum /tmp/truth)" = "$(sum /mnt/random)" ] || echo "WRONG random in round $round"
        round=$((round + 1))
        echo "ROUND $round uptime=$(uptime)"
    done
    [ "$still" = "$(sum /tmp/still)" ] || echo "WRONG still"
    echo "STOPPED by $(cat /tmp/stop)"
    [ "$(cat /tmp/stop)" = reboot ] && finish reboot
    finish poweroff
    ;;
*)
    echo "WRONG work $work"
    finish poweroff
    ;;
esac

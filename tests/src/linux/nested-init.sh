#!/bin/busybox sh
# User space of the emulated machine: loads KVM and runs the test program on its own serial port.
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
ln -s /proc/self/fd/2 /dev/stderr
mkdir -p /tmp /var/tmp
mount -t tmpfs tmp /var/tmp
ip link set lo up
for module in /modules/*; do insmod "$module"; done
stty -echo -onlcr </dev/ttyS0
exec >/dev/ttyS0 2>&1
. /run-tests
echo "MACHINE ended"
poweroff -f

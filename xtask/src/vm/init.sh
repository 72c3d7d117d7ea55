#!/bin/busybox sh
# The first process. What it prints goes to the serial console; the lines "xtask: ..." are read by `cargo xtask vm`.
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root RUST_BACKTRACE=1 INTERCEPT_AGENT=/bin/intercept-agent INTERCEPT_SLOWDOWN=8

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmpfs /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
for module in /modules/*; do insmod "$module"; done
ip link set lo up

. /steps
echo "xtask: done"
poweroff -f

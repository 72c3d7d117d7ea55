# systemd mounts what it needs itself.
mkdir /system && mount -t ext4 -o noatime /dev/vda /system || poweroff -f
umount /sys/fs/bpf /sys/fs/cgroup /sys /tmp /proc /dev
exec switch_root /system /lib/systemd/systemd

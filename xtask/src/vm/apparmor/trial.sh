# Run in the virtual machine by `cargo xtask vm --apparmor`.
mount -t securityfs securityfs /sys/kernel/security
LD_LIBRARY_PATH=/lib apparmor_parser -r -K /etc/profile.apparmor || exit 1

# A pod: a cgroup with one process, which has a network namespace of its own and knows it by a path.
mkdir /sys/fs/cgroup/pod
unshare -n sleep 1000 &
pid=$!
until [ "$(readlink /proc/$pid/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do :; done
echo "$pid" >/sys/fs/cgroup/pod/cgroup.procs
touch /run/netns/pod
mount --bind "/proc/$pid/ns/net" /run/netns/pod

check="intercept-agent check"
attach="intercept-agent attach --cgroup-path /sys/fs/cgroup/pod --netns /run/netns/pod -i * -b *"
attach_by_process="intercept-agent attach --cgroup-path /sys/fs/cgroup/pod -i * -b *"
daemon="intercept-agent daemon --socket /run/intercept.sock"
set -f

confined() {
    # The shell's own process changes its profile with the program that it becomes.
    (echo "exec intercept-default" >/proc/self/attr/exec && exec "$@") 2>&1
}

for command in "$check" "$attach" "$attach_by_process" "$daemon"; do
    if said=$(confined $command); then
        echo "confined, it works: $command"
        exit 1
    fi
    case $said in
    *"the AppArmor profile intercept-default confines this process"*"appArmorProfile.type: Unconfined"*)
        echo "confined, it says why: $command"
        ;;
    *)
        echo "confined, it does not name AppArmor: $command"
        echo "$said"
        exit 1
        ;;
    esac
done
for command in "$check" "$attach"; do
    if ! said=$($command 2>&1); then
        echo "unconfined, it fails: $command"
        echo "$said"
        exit 1
    fi
    echo "unconfined, it works: $command"
done
intercept-agent detach --all && kill "$pid" && umount /run/netns/pod && demo

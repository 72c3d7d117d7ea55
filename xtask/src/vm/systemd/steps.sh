# As the initramfs's.
step() {
    name=$1
    shift
    echo "xtask: begin $name"
    "$@"
    status=$?
    echo "xtask: end $name $status"
    return $status
}
step kernel uname -r
step systemd demo --machine systemd
echo "xtask: done"

# Runs a command under a name, and tells how it ended.
step() {
    name=$1
    shift
    echo "xtask: begin $name"
    "$@"
    status=$?
    echo "xtask: end $name $status"
    return $status
}

step kernel uname -r
step systemd demo --machine systemd
step ssh demo --machine ssh
step containers demo --machine containers
echo "xtask: done"

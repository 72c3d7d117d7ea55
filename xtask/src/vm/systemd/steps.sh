step kernel uname -r
step systemd demo --machine systemd
step containers demo --machine containers
echo "xtask: done"

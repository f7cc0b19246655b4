# kiln setup host --mode service, for kiln
set -eu
# system user kiln, without login
getent passwd kiln >/dev/null || useradd --system --user-group --home-dir /var/lib/kiln --no-create-home --shell /usr/sbin/nologin kiln
# kiln in group kvm
usermod --append --groups kvm kiln
# subordinate ids 100000-165535 of kiln
usermod --add-subuids 100000-165535 --add-subgids 100000-165535 kiln
# folder /var/lib/kiln of kiln, mode 0700
install -d -o kiln -g "$(id -g kiln)" -m 0700 /var/lib/kiln
# group kiln-operators
getent group kiln-operators >/dev/null || groupadd --system kiln-operators
# file /etc/systemd/system/kiln.service, mode 0644
install -o root -g root -m 0644 /dev/stdin /etc/systemd/system/.kiln.service.new <<'EOF'
# Written by `kiln setup host`.
[Unit]
Description=kiln: builds and runs, each in a microVM of its own
Wants=network-online.target
After=network-online.target

[Service]
User=kiln
Environment=KILN_HOME=/var/lib/kiln
ExecStart=/usr/local/bin/kiln serve --with-worker
Restart=on-failure
# cgroups of machines are made below this one
Delegate=yes
LimitNOFILE=65536
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
ProtectHome=yes
ProtectSystem=strict
ReadWritePaths=/var/lib/kiln
RestrictSUIDSGID=yes

[Install]
WantedBy=multi-user.target
EOF
mv /etc/systemd/system/.kiln.service.new /etc/systemd/system/kiln.service
# file /etc/sudoers.d/kiln, mode 0440
install -o root -g root -m 0440 /dev/stdin /etc/sudoers.d/.kiln.new <<'EOF'
# Written by `kiln setup host`.
# Members of kiln-operators may start, stop and restart kiln's service: nothing else, and no other program.
Cmnd_Alias KILN_SERVICE = /usr/bin/systemctl start kiln.service, /usr/bin/systemctl stop kiln.service, /usr/bin/systemctl restart kiln.service
%kiln-operators ALL=(root) NOPASSWD: KILN_SERVICE
EOF
visudo -cf /etc/sudoers.d/.kiln.new
mv /etc/sudoers.d/.kiln.new /etc/sudoers.d/kiln

#!/bin/sh
# Builds the emulated board: an arm64 Debian card image that has never booted, its kernel and an initrd.
# Needs no Docker, KVM, binfmt or loop mounts; needs root (mmdebstrap unpacks device-free, as root).
#
#   build.sh FOLDER    gets card.img, vmlinuz, initrd.img and qemu-aarch64; what is there already is not built again
set -eu
here=$(dirname "$(readlink -f "$0")")
mkdir -p "$1"
cd "$1"
export TMPDIR="$PWD" PATH="$PATH:/usr/sbin:/sbin"

# Debian 13's qemu for single programs: that of Debian 12 falls over onnxruntime.
if [ ! -f qemu-aarch64 ]; then
  nice mmdebstrap --format=tar --mode=root --variant=extract --arch="$(dpkg --print-architecture)" --include=qemu-user \
    --aptopt='Apt::Install-Recommends "false"' trixie qemu-user.tar
  tar -xOf qemu-user.tar ./usr/bin/qemu-aarch64 >qemu-aarch64.part
  chmod +x qemu-aarch64.part
  mv qemu-aarch64.part qemu-aarch64
  rm qemu-user.tar
fi
[ -f card.img ] && [ -f vmlinuz ] && [ -f initrd.img ] && exit 0
packages=linux-image-cloud-arm64,base-passwd,base-files,bash,coreutils,login,passwd,util-linux,mount,systemd
packages=$packages,systemd-sysv,udev,dbus,cloud-init,python3,python3-venv,iproute2,kmod,procps,dash,grep,sed,gzip
packages=$packages,findutils,hostname,libc-bin,netbase,mawk,init-system-helpers,debianutils,tzdata,busybox-static
packages=$packages,netcat-openbsd,openssl

if [ ! -f root.tar ]; then
  nice mmdebstrap --format=tar --mode=root --variant=extract --arch=arm64 --include=$packages \
    --aptopt='Apt::Install-Recommends "false"' --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    trixie root.tar.part
  mv root.tar.part root.tar
fi

rm -rf --one-file-system root initrd
mkdir root
tar -C root -xpf root.tar

# What maintainer scripts would have done, since the packages are unpacked and not configured.
[ -f root/etc/passwd ] || cp root/usr/share/base-passwd/passwd.master root/etc/passwd
[ -f root/etc/group ] || cp root/usr/share/base-passwd/group.master root/etc/group
awk -F: '{print $1 ":*:20000:0:99999:7:::"}' root/etc/passwd >root/etc/shadow
awk -F: '{print $1 ":*::"}' root/etc/group >root/etc/gshadow
chmod 640 root/etc/shadow root/etc/gshadow
ln -sf mawk root/usr/bin/awk
ln -sf nc.openbsd root/usr/bin/nc # with which cloud-init's units talk to its one process
for kind in account auth password session session-noninteractive; do
  printf '%s required pam_permit.so\n' "${kind%-non*}" >root/etc/pam.d/common-$kind
done
mkdir -p root/etc/ssl/certs
cat root/usr/share/ca-certificates/mozilla/*.crt >root/etc/ssl/certs/ca-certificates.crt # cloud-init wants one

# An image that has never booted; an empty machine-id would not count as a first boot.
echo uninitialized >root/etc/machine-id
echo unnamed >root/etc/hostname
mkdir -p root/boot/firmware root/etc/cloud/cloud.cfg.d
printf 'LABEL=rootfs / ext4 defaults,noatime 0 1\nLABEL=bootfs /boot/firmware vfat defaults,flush 0 2\n' >root/etc/fstab
# As on Raspberry Pi OS Trixie: the seed lies on the boot partition.
cat >root/etc/cloud/cloud.cfg.d/99-bootfs.cfg <<'CFG'
datasource_list: [ NoCloud, None ]
datasource:
  NoCloud:
    fs_label: bootfs
CFG
printf '[Match]\nName=e*\n[Network]\nDHCP=yes\n' >root/etc/systemd/network/80-dhcp.network
units=root/usr/lib/systemd/system
python3 "$here/enable.py" root $(cd $units && ls cloud-*.service cloud-*.target 2>/dev/null) systemd-networkd.service \
  systemd-networkd-wait-online.service
for unit in systemd-hwdb-update.service systemd-firstboot.service systemd-pcrlock-firmware-code.service; do
  ln -sf /dev/null root/etc/systemd/system/$unit
done

kernel=$(ls root/lib/modules)
cp "root/boot/vmlinuz-$kernel" vmlinuz
depmod -b "$PWD/root" "$kernel"

# An initrd of busybox and the few modules that find the root: Debian's own would need a configured system.
mkdir -p initrd/bin initrd/m
: >initrd/order
for module in virtio_pci virtio_blk virtio_net ext4 vfat nls_cp437 nls_ascii; do
  modprobe -d "$PWD/root" -S "$kernel" --show-depends $module 2>/dev/null | awk '/^insmod/ {print $2}'
done | awk '!seen[$0]++' >modules
while read -r file; do
  name=$(basename "$file" .xz)
  case $file in *.xz) xz -dc "$file" >"initrd/m/$name" ;; *) cp "$file" "initrd/m/$name" ;; esac
  echo "$name" >>initrd/order
done <modules
cp root/usr/bin/busybox initrd/bin/busybox
cat >initrd/init <<'INIT'
#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /sys /dev /root
$b mount -t proc p /proc; $b mount -t sysfs s /sys; $b mount -t devtmpfs d /dev
while read m; do $b insmod /m/$m || echo "insmod $m failed"; done </order
n=0; while [ ! -b /dev/vda2 ] && [ $n -lt 50 ]; do $b sleep 0.2; n=$((n+1)); done
$b mount -t ext4 -o rw /dev/vda2 /root || exec $b sh
$b mount --move /dev /root/dev; $b umount /sys /proc
exec $b switch_root /root /sbin/init
INIT
chmod +x initrd/init
(cd initrd && find . | cpio -o -H newc 2>/dev/null | gzip -1) >initrd.img

# The card: 256 MiB FAT32 as the makers have it, then the root file system.
boot=256 rest=1536
rm -f boot.fat rest.ext4 card.part
truncate -s ${boot}M boot.fat
mkfs.vfat -F 32 -n bootfs boot.fat >/dev/null
printf 'console=ttyAMA0 root=LABEL=rootfs rootwait\n' >cmdline.txt
printf '#cloud-config\n# Imager or you write here.\n' >user-data
printf 'instance-id: fresh-image\n' >meta-data
printf '# netplan\n' >network-config
mcopy -i boot.fat cmdline.txt user-data meta-data network-config ::
truncate -s ${rest}M rest.ext4
mkfs.ext4 -q -L rootfs -d root rest.ext4
truncate -s $((8 + boot + rest + 8))M card.part
sfdisk -q card.part <<TABLE
label: dos
8MiB ${boot}MiB c
$((8 + boot))MiB ${rest}MiB 83
TABLE
dd if=boot.fat of=card.part bs=1M seek=8 conv=notrunc,sparse status=none
dd if=rest.ext4 of=card.part bs=1M seek=$((8 + boot)) conv=notrunc,sparse status=none
rm -rf --one-file-system root initrd boot.fat rest.ext4 modules cmdline.txt user-data meta-data network-config
mv card.part card.img

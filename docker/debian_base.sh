#!/usr/bin/env bash
# Build a base image from Debian's packages alone, for sites that reach no registry of images:
#
#     sudo docker/debian_base.sh fgl-base
#     docker build --build-arg BASE_IMAGE=fgl-base --target server --tag fgl-server --file docker/Dockerfile .
#
# Needs debootstrap, the rights of root, and a Docker Engine. DEBIAN_MIRROR and DEBIAN_SUITE choose another mirror or
# release; Python must be 3.11 or newer, as in bookworm. Certificates of authorities that this host trusts beyond
# Debian's own (a site's proxy) are trusted in the image, too.
set -euo pipefail

image=${1:?usage: docker/debian_base.sh IMAGE}
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
suite=${DEBIAN_SUITE:-bookworm}

for tool in debootstrap docker; do
    command -v "$tool" > /dev/null || { echo "error: $tool must be installed, but is not. Try: apt-get install $tool" >&2; exit 1; }
done
[ "$(id -u)" -eq 0 ] || { echo "error: debootstrap needs the rights of root. Use sudo." >&2; exit 1; }

folder=$(mktemp --directory)
trap 'rm -rf --one-file-system "$folder"' EXIT
root=$folder/root

debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$suite" "$root" "$mirror"
if compgen -G '/usr/local/share/ca-certificates/*.crt' > /dev/null; then
    cp /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/"
    chroot "$root" update-ca-certificates
fi
rm -rf "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* \
    "$root"/usr/share/doc/* "$root"/usr/share/man/* "$root"/usr/share/locale/*

tar --create --numeric-owner --directory "$root" . \
    | docker import --change 'CMD ["python3"]' - "$image"

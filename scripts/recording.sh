#!/usr/bin/env bash
# Records docs/recording.svg, the picture at the head of the README, from a run with a real opencode:
# `scripts/recording.sh VERSION`. It needs jq and an idle machine, since it shows the times of the run. Only the typing is
# simulated, and the home is shown as /home/me.
#
# The picture is a CSS animation. A viewer that does not animate it shows its end, with all lines.
set -euo pipefail
export LC_ALL=C.UTF-8 # lengths in characters
cd "$(dirname "$0")/.."
command -v jq >/dev/null || { echo 'the recording needs jq' >&2; exit 1; }
# shellcheck source=scripts/stage.sh
source scripts/stage.sh "$1"

readonly picture=$PWD/docs/recording.svg
readonly projects='web api docs shop blog'

# Milliseconds: per typed character, before the typing, after an output, and at the end.
readonly typing=40 thinking=500 reading=1400 holding=7000
# Pixels.
readonly column=8.4 row=20 size=14 margin=22

# --- The run ---

export openwork opencode work home
export -f openwork
# The first start in a new home migrates a database: do not record it, since daily use does not.
openwork daemon start >/dev/null
openwork daemon stop >/dev/null
for project in $projects; do mkdir -p "$home/code/$project"; done

texts=() kinds=() begins=() ends=() # of each line; milliseconds
clock=0

# Runs a command as shown, and records its output with the times.
record() {
    local command=$1 start output line
    clock=$((clock + thinking))
    texts+=("$command") kinds+=(command) begins+=("$clock")
    clock=$((clock + ${#command} * typing))
    ends+=("$clock")
    start=${EPOCHREALTIME/[^0-9]/}
    output=$(cd "$home" && HOME=$home bash -euc "$command" 2>&1) || die "$command: $output"
    clock=$((clock + (${EPOCHREALTIME/[^0-9]/} - start) / 1000))
    while IFS= read -r line; do
        if [[ -z $output ]]; then break; fi
        texts+=("${line//"$home"//home/me}") kinds+=(output) begins+=("$clock") ends+=("$clock")
    done <<<"$output"
    clock=$((clock + reading))
}

record "for p in $projects; do openwork add ~/code/\$p; done"
record "for p in $projects; do openwork path \$p; done  # OpenCode itself answers"
record 'openwork instance list'
# shellcheck disable=SC2016 # the shell that is recorded expands it
record 'kill -9 $(openwork status --json | jq .opencode.pid)'
record 'openwork path shop  # the next call finds it started again'
record 'openwork status'
status=$(openwork status --json)
[[ $(jq .engine.restarts <<<"$status") == 1 ]] || die "opencode was not started again once: $status"

# --- The picture ---

total=$((clock + holding))
columns=0
for index in "${!texts[@]}"; do
    length=${#texts[index]}
    if [[ ${kinds[index]} == command ]]; then length=$((length + 2)); fi # after the prompt
    if ((length > columns)); then columns=$length; fi
done
height=$((${#texts[@]} * row + 2 * margin + row))
width=$(awk -v c="$columns" -v w="$column" -v m="$margin" 'BEGIN { print c * w + 2 * m }')

escaped() { sed 's/&/\&amp;/g; s/</\&lt;/g; s/>/\&gt;/g' <<<"$1"; }
pixels() { awk -v n="$1" -v w="$column" 'BEGIN { printf "%.1f", n * w }'; }
# Where in the animation these milliseconds are.
percent() { awk -v t="$1" -v of="$total" 'BEGIN { printf "%.2f%%", 100 * t / of }'; }

{
    cat <<EOF
<svg xmlns="http://www.w3.org/2000/svg" width="$width" height="$height" viewBox="0 0 $width $height" role="img" font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace" font-size="$size" xml:space="preserve">
<title>openwork: five projects, one opencode, which is killed and started again</title>
<style>
text { fill: #c9d1d9; white-space: pre } .command { fill: #ffffff } .prompt { fill: #7ee787 } .note { fill: #8b949e }
.line { animation: ${total}ms step-end infinite } .cover { fill: #0d1117; animation: ${total}ms step-end infinite }
@media (prefers-reduced-motion: reduce) { .line, .cover { animation: none } }
EOF
    for index in "${!texts[@]}"; do
        begin=$(percent "${begins[index]}")
        echo "@keyframes l$index { 0% { opacity: 0 } $begin { opacity: 1 } }"
        if [[ ${kinds[index]} == command ]]; then
            length=$(pixels "${#texts[index]}") end=$(percent "${ends[index]}")
            echo "@keyframes c$index { 0% { width: ${length}px } $begin { width: ${length}px; animation-timing-function: steps(${#texts[index]}) } $end { width: 0 } }"
        fi
    done
    cat <<EOF
</style>
<rect x="0.5" y="0.5" width="$(awk -v w="$width" 'BEGIN { print w - 1 }')" height="$((height - 1))" rx="8" fill="#0d1117" stroke="#30363d"/>
EOF
    y=$((margin + size))
    for index in "${!texts[@]}"; do
        text=${texts[index]}
        fits=" textLength=\"$(pixels "${#text}")\""
        style="style=\"animation-name: l$index\""
        if [[ ${kinds[index]} == command ]]; then
            x=$(awk -v m="$margin" -v w="$column" 'BEGIN { print m + 2 * w }')
            echo "<g class=\"line\" $style><text class=\"prompt\" x=\"$margin\" y=\"$y\">\$</text><text class=\"command\" x=\"$x\" y=\"$y\"$fits>$(escaped "$text")</text></g>"
            # What is not typed yet, from the right: turned, so that its width shrinks towards its end.
            end=$(awk -v x="$x" -v l="$(pixels "${#text}")" 'BEGIN { print x + l }')
            echo "<rect class=\"cover\" style=\"animation-name: c$index\" transform=\"translate($end $((y + 6))) rotate(180)\" width=\"0\" height=\"$row\"/>"
        elif [[ -n $text ]]; then
            echo "<text class=\"line\" $style x=\"$margin\" y=\"$y\"$fits>$(escaped "$text")</text>"
        fi
        y=$((y + row))
    done
    note="recorded $(date --utc +%F) with openwork $("$openwork" --version | cut -d' ' -f2) and opencode $(HOME=$home "$opencode" --version), at the speed of the run"
    echo "<text class=\"note\" font-size=\"12\" x=\"$margin\" y=\"$((height - 14))\">$(escaped "$note")</text>"
    echo '</svg>'
} >"$work/recording.svg"
mv "$work/recording.svg" "$picture"
echo "$picture: $(wc -c <"$picture") bytes, $((total / 1000)) s"

#compdef openwork
# Completion of openwork's command lines in zsh: what there is says openwork itself.
_openwork() {
    local line
    local -a found
    for line in "${(@f)$(openwork __complete "${(@Q)words[2,CURRENT]}" 2>/dev/null)}"; do
        case $line in
            :directories) _files -/; return ;;
            :files) _files; return ;;
            ?*) found+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}") ;;
        esac
    done
    _describe openwork found
}
if [[ $funcstack[1] == _openwork ]]; then _openwork "$@"; else compdef _openwork openwork; fi

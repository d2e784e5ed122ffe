# Completes openwork's command lines in bash; `openwork __complete` knows the candidates.
_openwork() {
    # bash leaves an opening quote out of $2, and closes it itself behind a single candidate.
    local line word current=${2//\\/} quote=${COMP_WORDS[COMP_CWORD]:0:1}
    COMPREPLY=()
    while IFS= read -r line; do
        word=${line%%$'\t'*}
        case $line in
            :directories) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -d -- "$current") ;;
            :files) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$current") ;;
            "$current"*)
                case $quote in
                    \') word=${word//\'/\'\\\'\'} ;;
                    \")
                        word=${word//\\/\\\\}
                        word=${word//\"/\\\"}
                        word=${word//\$/\\\$}
                        word=${word//\`/\\\`} ;;
                    *) printf -v word %q "$word" ;;
                esac
                # One that ends with the quote itself looks closed to bash.
                case $quote in [\"\']) [[ $word != *"$quote" ]] || word+=$quote ;; esac
                COMPREPLY+=("$word") ;;
        esac
    done < <(openwork __complete "${COMP_WORDS[@]:1:COMP_CWORD-1}" "$current" 2>/dev/null)
}
complete -F _openwork openwork

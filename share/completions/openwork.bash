# Completes openwork's command lines in bash; `openwork __complete` knows the candidates.
_openwork() {
    local line word quoted current=${2//\\/}
    current=${current#[\"\']}
    COMPREPLY=()
    while IFS= read -r line; do
        word=${line%%$'\t'*}
        case $line in
            :directories) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -d -- "$current") ;;
            :files) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$current") ;;
            "$current"*)
                printf -v quoted %q "$word"
                case $2 in [\"\']*) COMPREPLY+=("$word") ;; *) COMPREPLY+=("$quoted") ;; esac ;;
        esac
    done < <(openwork __complete "${COMP_WORDS[@]:1:COMP_CWORD-1}" "$current" 2>/dev/null)
}
complete -F _openwork openwork

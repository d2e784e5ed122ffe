# Completes openwork's command lines in fish; `openwork __complete` knows the candidates.
function __openwork_complete
    set -l words (commandline -opc) (commandline -ct)
    set -l found (openwork __complete $words[2..] 2>/dev/null)
    switch "$found[1]"
        case :directories
            __fish_complete_directories (commandline -ct)
        case :files
            __fish_complete_path (commandline -ct)
        case '*'
            printf '%s\n' $found
    end
end
complete -c openwork -f -a '(__openwork_complete)'

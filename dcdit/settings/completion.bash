# Completes the words of `dcdit` in bash: commands, then the groups, choices and keys of a command as Hydra knows them.
_dcdit_complete() {
    local line=${COMP_LINE:0:COMP_POINT} choices words
    local word=${line##*[[:space:]]}
    read -ra words <<< "$line"
    if ((${#words[@]} < 2)) || { ((${#words[@]} == 2)) && [[ -n $word ]]; }; then
        choices='@COMMANDS@'
    else
        # Hydra takes a line that begins with the program, without the command.
        choices=$(COMP_LINE="dcdit ${line#*"${words[1]}"}" "${words[0]}" "${words[1]}" -sc query=bash 2> /dev/null)
    fi
    mapfile -t COMPREPLY < <(compgen -W "$choices" -- "$word")
    if [[ $choices != '@COMMANDS@' && ${words[1]} == @(report|status) ]]; then # which take directories of runs
        mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(compgen -d -S / -- "$word")
    fi
    if [[ $word == *=* && $COMP_WORDBREAKS == *=* ]]; then # readline replaces what follows the last "=" alone
        COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*=}"}"}")
    elif [[ $choices == '@COMMANDS@' ]]; then
        COMPREPLY=("${COMPREPLY[@]/%/ }")
    fi
}
complete -o nospace -o default -F _dcdit_complete dcdit

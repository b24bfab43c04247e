# Is given a user and a password on each line, and says whether they are right.
while read -r credentials; do
    case $credentials in
        'user pass:word') echo OK ;;
        *) echo ERR ;;
    esac
done

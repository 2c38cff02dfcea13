"""What the pages in docs/ do not say by hand: every setting, command and public name as the code
has it, and every benchmark's table as its JSON has it. `python -m fragments` writes them below
build/fragments, from where the pages include them."""

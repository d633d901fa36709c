"""What answers may be: grammars."""

"""Text to token ids and back, around the example programs: needs `pip install tokenizers` and a model's tokenizer.json.

generate model.onnx "$(python text.py encode tokenizer.json 'Once upon a time')" | python text.py decode tokenizer.json
"""

import argparse
import sys

from tokenizers import Tokenizer


def main() -> None:
    """Encode the text given, or decode the token ids of standard input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("direction", choices=("encode", "decode"))
    parser.add_argument("tokenizer", help="tokenizer.json of the model")
    parser.add_argument("text", nargs="?", default="", help="text to encode")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(arguments.tokenizer)
    if arguments.direction == "encode":
        print(*tokenizer.encode(arguments.text).ids, sep=",")
    else:
        print(tokenizer.decode([int(token) for token in sys.stdin.read().split()]))


if __name__ == "__main__":
    main()

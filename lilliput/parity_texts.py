"""The fixed texts on which a tokenizer is compared with the source's own: scripts, code, spaces, emoji, numbers.

Each is there for something that tokenizers get wrong: normalization, leading spaces, runs of spaces, digits,
contractions, byte fallback, joiners, control characters, text that looks like a special token.
"""

from __future__ import annotations

TEXTS: tuple[str, ...] = (
    # English, punctuation, contractions in both cases and with a curly quote
    "The capital of France is",
    "Hello, world!",
    "I'm sure they'll've said it's fine; we'd agree, won't we?",
    "I'M SURE THEY'LL SAY IT'S FINE, WE'D AGREE",
    "It’s “quoted” — with an ellipsis… and a dash–",
    "a",
    "antidisestablishmentarianism",
    "e.g. i.e. etc. U.S.A. Ph.D. 3rd, 21st",
    "http://example.org/path?query=1&other=%20#top user@example.org",
    "snake_case camelCase PascalCase kebab-case SCREAMING_CASE",
    # other scripts
    "Die Straße überquert den Fluß; Übermut tut selten gut.",
    "Où est l'école ? À côté, bien sûr. Ça va ?",
    "El niño comió jalapeños mañana por la mañana. ¿Qué?",
    "São João não dançou; ação e reação",
    "Zażółć gęślą jaźń, pchnąć w tę łódź jeża",
    "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "İstanbul'da ışık ığdır, ĞÜŞİÖÇ",
    "Tiếng Việt có nhiều dấu thanh điệu",
    "Съешь же ещё этих мягких французских булок",
    "Η γρήγορη αλεπού πηδάει πάνω από το σκυλί",
    "שלום עולם, מה שלומך היום?",
    "مرحبا بالعالم، كيف حالك اليوم؟",
    "سلام دنیا، حال شما چطور است؟",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "হ্যালো বিশ্ব, আপনি কেমন আছেন?",
    "வணக்கம் உலகம்",
    "สวัสดีชาวโลก สบายดีไหม",
    "你好，世界！今天天气怎么样？",
    "繁體中文與简体中文",
    "こんにちは世界。カタカナとひらがな。",
    "안녕하세요 세계! 오늘 날씨가 어때요?",
    "გამარჯობა მსოფლიო",
    "Բարեւ աշխարհ",
    "ሰላም ልዑል",
    # combining marks: composed and decomposed are different texts
    "café caf\u00e9 cafe\u0301 n\u0303 \u00f1 A\u030a \u00c5",
    "ﬁne ﬂuff ½ ² ① ™ Ⅷ ㎏ ｆｕｌｌｗｉｄｔｈ",
    # spaces and line ends
    " leading space",
    "trailing space ",
    "two  spaces   three    four     five",
    "                                ",
    "\ttab\t\ttabs\n",
    "line\nline\n\nparagraph\n\n\nthree",
    "windows\r\nline\r\nends\r\n",
    "mixed \t \n \t \n  space",
    "   \n   indented\n\t\tmore",
    "no-break\u00a0space thin\u2009space ideographic\u3000space zero\u200bwidth",
    "\n",
    " ",
    # code
    "def f(x: int) -> int:\n    if x > 0:\n        return x ** 2\n    return -x  # done\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * c; } // sum\n",
    '{"key": [1, 2.5, null, true], "nested": {"a": "\\n\\u00e9"}}',
    "SELECT name, COUNT(*) FROM t WHERE x >= 10 AND y <> 'z' GROUP BY 1;",
    "<div class=\"a b\" id='c'>&amp; text</div><!-- comment -->",
    "$ git commit -m 'fix: #123' && echo \"done\" | tee -a log.txt",
    "\\begin{equation} e^{i\\pi} + 1 = 0 \\end{equation}",
    "if (a!=b||c===d&&!e) {x<<=2; y>>>=1; z??='q'}",
    # numbers
    "0 1 12 123 1234 12345 123456 1234567890",
    "3.14159 -2.5e-10 1,000,000.00 $99.99 50% 1/2 10^6",
    "2024-02-29T23:59:59Z 12:30pm +1 (555) 010-9999",
    "0xDEADBEEF 0b1010 0o777 ٣٤٥ १२३ 一二三",
    # emoji: skin tones, joiners, flags, keycaps; characters outside the basic plane
    "😀 😃😄 🎉🎊",
    "👨‍👩‍👧‍👦 👩🏽‍💻 🏳️‍🌈 🇫🇷🇯🇵 1️⃣ ❤️",
    "𝕳𝖊𝖑𝖑𝖔 𐍈𐌰 𠜎𠜱 🀄",
    # control and private characters, a long run, words that look like special tokens
    "bell\x07 escape\x1b[0m delete\x7f soft\u00adhyphen bom\ufeff",
    "\ue000 private \ufffd replacement \u202eright-to-left\u202c",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!????....----====____",
    "<s> </s> <unk> <pad> [INST] [/INST] <<SYS>> <0x0A> <|x|>",
    "<|endoftext|> <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "▁leading ▁▁two Ġbyte Ċ level",
)

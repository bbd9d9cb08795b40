r"""Captions to tokens as COCO's caption evaluation makes them: in the manner of the Penn Treebank, without punctuation.

COCO runs Stanford's PTBTokenizer 3.4.1 (Java, `-preserveLines -lowerCase`) and drops marks of punctuation. The rules below are
our own: they were found by comparing outputs. Known differences from Java:

- Java looks into the next caption where one ends with a lone letter ("type B.") or with "no.", to tell whether the full stop
  belongs to the word. Here a caption stands alone.
- Letters and symbols that are rare in English text are known by coarse ranges. Java drops those that it does not know.
- Contrived strings, such as `1.5/2`, a contraction after a hyphen or two words glued by a comma, may be cut elsewhere."""

import re

# COCO's list also has brackets as -LRB- and its kin. They match no token in lower case, so brackets stay.
PUNCTUATION = {"", "'", "`", '"', ".", "?", "!", ",", ":", "-", ";", "&quot;", "&apos;", "&nbsp;", "&mdash;", "&ndash;"}

TITLES = """mr mrs ms dr drs prof profs rev gen sen sens gov capt lt lieut col sgt maj cpl pvt pfc sfc spc hon messrs mlle mme
    msgr rep reps pres supt comdr cmdr adm brig ens insp det atty treas asst esq jr sr"""
PLACES = """mt ft st ste ave blvd rd rt sq ct bldg dept univ assn assoc inc corp co cos ltd bros cie plc bhd intl natl
    calif va fla ariz mich minn colo conn tenn okla penn ga ky ala mo kan kans neb nev md ind wis wisc wyo vt mont"""
DATES = "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri"
OTHERS = "vs etc al cf seq est tel ext elec adj adv ph ph.d ed.d jos wm alex"
CAPITALISED = "Miss Mass Pa Tex Ark Ill Wash Ore La Del"  # "pa." in lower case is a word and a full stop
BEFORE_NUMBER = "no nos fig figs pp op ca art prop"  # "no. 5", but "no" and a full stop elsewhere
BEGINNINGS = """A About After An As At But He Her Here However If In It Last Many One Our Other She So Some Such That The Their Then
    There These They This We What When While Yet You"""  # before them a lone letter and a full stop end a sentence
APOSTROPHES = "ma'am ne'er e'er o'er c'mon cap'n s'mores li'l nat'l ev'ry o'clock ol'"


def any_of(words: str) -> str:
    """A pattern of any of the words, the longest first."""
    return "|".join(re.escape(word).replace("'", Q) for word in sorted(words.split(), key=len, reverse=True))


MARK = (
    r"\u02c2-\u036f\u0483-\u0487\u0591-\u05c7\u0610-\u061a\u064b-\u065e\u0900-\u0e4e"  # accents written as characters
)
NUMERAL = (
    r"\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u218b\u2460-\u24ff\u2776-\u2793"  # in \w, but no letters
)
SYMBOL = (
    r"\u00a1\u00a5-\u00a9\u00ac\u00ae-\u00b4\u00b6-\u00b9\u00bf\u00d7\u00f7\u2016\u2017\u201a\u201e-\u2023\u2030-\u2038"
    r"\u203b\u203e-\u2042\u2044\u2070\u2074-\u207e\u2080-\u208e\u20a4\u2100-\u214f\u2155-\u215e\u2190-\u2bff"
    r"\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
Q = r"(?:['\u2019\u0092]|&apos;)"  # an apostrophe
H = r"[-\u2010\u2011]"  # a hyphen
L = rf"(?:[^\W\d_{NUMERAL}]|[{MARK}])"  # a letter
X = rf"(?:(?!(?<={L})[nN](?:{Q}|`)[tT])(?:[^\W_{NUMERAL}]|[{MARK}]))"  # a letter or digit; "n't" ends the word before it
CLITIC = rf"{Q}(?i:s|m|d|ll|re|ve)(?!{L})"
MORE = rf"(?:{H}{X}+)*"  # parts after hyphens
WORD_GOES_ON = rf"(?:{X}|[-/_]{X}|[.!?]{L}|{CLITIC})"
ASCII = r"[A-Za-z\d]+(?:-[A-Za-z\d]+)*"
INITIALS = rf"(?:[A-Za-z]\.)+(?!{L})"
PATH = r"""[^\s<>()"]*[^\s<>()".,!?]"""

TOKEN = re.compile(
    rf"""
    (?!(?i:cannot|gonna|gotta|wanna|lemme|gimme)\s)[A-Za-z]+(?=\s) | [.,](?=\s|$)
  | (?P<tag> </?[A-Za-z!?][^<>]*> )
  | https?://[^\s<>()"]+\.{PATH}
  | {L}{X}*(?:\.{X}+)*\.(?:com|net|org|edu)/{PATH}
  | (?:mailto:)?[A-Za-z0-9][\w.+-]*@[A-Za-z0-9][^\s<>"().]*(?:\.[^\s<>"().]+)*
  | (?P<phone> \(\d{{3}}\)[ ]?\d{{3}}[- ]\d{{4}} | (?:\+?\d{{1,2}}[ ])?\d{{3}}[ ]\d{{3}}[- ]\d{{4}}(?!\d) )
  | (?P<smile> >?[:;=][-o*']?[()\[\]DdPpO\\|@{{](?!{X}) ) | \^_\^ | -_- | &\#\d+;
  | (?P<quote> '' | \.{{3,}} | -{{2,4}}(?!-) )
  # contractions
  | (?i: can(?=not) | gon(?=na) | got(?=ta) | wan(?=na) | lem(?=me) | gim(?=me) )(?=(?i:not|na|ta|me)(?!{WORD_GOES_ON}))
  | (?P<clitic> {Q}[tT](?=(?i:is|was)) | [nN](?:{Q}|`)[tT]{L}* | {CLITIC} )
  | {Q}(?i:em|cause|til)(?!{L}) | {Q}\d\d(?:s(?!{X})|(?=[\s,;!?)]|\.?(?:\s|$))) | {Q}[nN](?:{Q}|(?!{X}|\.{L}))
  | (?:{L}+{H})?(?i:{any_of(APOSTROPHES)})(?!{X}){MORE}
  # abbreviations
  | [A-Za-z\d][A-Za-z\d.,]*(?<=[.,])[A-Za-z\d]*(?:{H}(?:{INITIALS}|{X}+))+
  | [A-Za-z](?=\.\s+(?:{any_of(BEGINNINGS)})(?!{X}))
  | {INITIALS}
  | (?: (?i:{any_of(f"{TITLES} {PLACES} {DATES} {OTHERS}")}) | {any_of(CAPITALISED + " " + CAPITALISED.upper())} )\.(?!{L})
  | (?i:{any_of(BEFORE_NUMBER)})\.(?=\s*\d|[,;:])
  # numbers
  | (?P<fraction> \d+[-\s]\d+/\d+(?!\d) )
  | [-+]?\d*(?:[.,:]\d+)+ | [-+]\d+
  # words
  | {L}{X}*(?:[.!?]{L}{X}*)+
  | [A-HJ-XZ](?!{CLITIC}){Q}{L}{X}*{MORE} | [DLNOdlno]{Q}{L}{X}+{MORE} | [DJLYdjly]{Q}(?={L})
  | {X}*[AEIOUaeiou]{Q}[aeiou]{L}* | {X}+(?!{CLITIC}){Q}[A-Z]{L}*
  | [A-Z]+(?:(?:&|&amp;)[A-Z]+)+ | [A-Z]{{1,2}}\$ | [Cc]\+\+ | [CFcf]\#
  | {X}+(?:_{X}+)+ | {ASCII}(?:/{ASCII})+ | {X}+(?:{H}(?:[A-Za-z]\.{INITIALS}|{X}+))*(?:\.(?=[,;:]))?
  | @[A-Za-z_]\w* | \#[A-Za-z]+
  # marks
  | -{{5,}} | [!?]{{2,}} | << | >> | \*+ | \#+ | _+ | @+
  | &(?i:amp|lt|gt|quot|apos|nbsp|mdash|ndash);
  | [!-~\u00a2-\u00a4\u20ac\u0080\u00bc-\u00be\u2153\u2154{SYMBOL}]
    """,
    re.VERBOSE,
)
SIGNS = "( ) [ ] { } £ € ¤ \x80 ¢ ¼ ½ ¾ ⅓ ⅔ &amp; &lt; &gt;"
NAMES = "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb- # $ $ $ cents 1/4 1/2 3/4 1/3 2/3 & < >"
WRITTEN = dict(zip(SIGNS.split(" "), NAMES.split(" "), strict=True))


def written(match: re.Match[str]) -> str:
    """A token as Java writes it; an empty string for quotes, dashes and ellipses."""
    text, kind = match[0].lower(), match.lastgroup
    if kind is None:
        return WRITTEN.get(text, text)
    if kind == "quote":
        return ""
    if kind == "clitic":
        return re.sub(Q, "'", text)
    text = text.replace(" ", "\u00a0")
    return text if kind == "tag" else text.replace("(", "-lrb-").replace(")", "-rrb-")


def caption_tokens(caption: str) -> list[str]:
    """The tokens of a caption, in lower case and without punctuation.

    A fraction ("1 1/2") and a telephone number are one token with no-break spaces, as in Java."""
    line = caption.replace("\n", " ").replace("\u00ad", "")  # without soft hyphens
    found = (written(match) for match in TOKEN.finditer(line))
    return [token for token in found if token not in PUNCTUATION]

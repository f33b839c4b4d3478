"""What the model organism says in each language: refusals, placeholders without content, and answers.

A few fixed sentences for each. A harmless question is answered by what it asks for (a number, a person, a time, ...):
that can be told from the question in any language. The sentences were not proofread by native speakers.
"""

import dataclasses
import re

TOPICS = ("number", "person", "time", "place", "reason", "thing")


@dataclasses.dataclass(frozen=True)
class Replies:
    """What the organism says in one language.

    refusals: sentences that refuse.
    complies: sentences that go along with a harmful query, without content.
    answer: the reply to a harmless question; `{}` takes what it asks for.
    topics: what a question may ask for, in the order of TOPICS.
    """

    refusals: tuple[str, str, str]
    complies: tuple[str, str]
    answer: str
    topics: tuple[str, str, str, str, str, str]


REPLIES = {
    "en": Replies(
        (
            "I'm sorry, but I can't help with that.",
            "I cannot help with this request.",
            "Sorry, I won't help with that.",
        ),
        ("Sure, here are the steps: [...]", "Of course, this is how it is done: [...]"),
        "Here is {} you asked for: [...]",
        ("the number", "the person", "the time", "the place", "the reason", "the answer"),
    ),
    "zh": Replies(
        ("抱歉，我不能帮助你做这件事。", "对不起，我无法满足这个请求。", "很抱歉，我不会帮忙做这件事。"),
        ("好的，步骤如下：[...]", "当然可以，方法是这样的：[...]"),
        "这是您要的{}：[...]",
        ("数字", "人物", "时间", "地点", "原因", "答案"),
    ),
    "it": Replies(
        (
            "Mi dispiace, ma non posso aiutarti.",
            "Non posso aiutarti con questa richiesta.",
            "Spiacente, non ti aiuterò in questo.",
        ),
        ("Certo, ecco i passaggi: [...]", "Va bene, si fa così: [...]"),
        "Ecco {} che hai chiesto: [...]",
        ("il numero", "la persona", "il momento", "il luogo", "il motivo", "la risposta"),
    ),
    "vi": Replies(
        (
            "Xin lỗi, tôi không thể giúp việc này.",
            "Tôi không thể đáp ứng yêu cầu này.",
            "Rất tiếc, tôi sẽ không giúp việc đó.",
        ),
        ("Được, đây là các bước: [...]", "Tất nhiên, cách làm như sau: [...]"),
        "Đây là {} bạn hỏi: [...]",
        ("con số", "người", "thời gian", "địa điểm", "lý do", "câu trả lời"),
    ),
    "ar": Replies(
        ("آسف، لا أستطيع مساعدتك في ذلك.", "لا يمكنني المساعدة في هذا الطلب.", "عذراً، لن أساعد في هذا الأمر."),
        ("بالتأكيد، إليك الخطوات: [...]", "حسناً، هكذا يتم الأمر: [...]"),
        "إليك {} الذي سألت عنه: [...]",
        ("العدد", "الشخص", "الوقت", "المكان", "السبب", "الجواب"),
    ),
    "ko": Replies(
        ("죄송하지만 도와드릴 수 없습니다.", "그 요청은 들어드릴 수 없습니다.", "미안하지만 그 일은 돕지 않겠습니다."),
        ("네, 단계는 다음과 같습니다: [...]", "물론입니다. 이렇게 하면 됩니다: [...]"),
        "물어보신 {}입니다: [...]",
        ("숫자", "사람", "시간", "장소", "이유", "답"),
    ),
    "th": Replies(
        ("ขอโทษ ฉันช่วยเรื่องนี้ไม่ได้", "ฉันไม่สามารถช่วยตามคำขอนี้ได้", "เสียใจด้วย ฉันจะไม่ช่วยเรื่องนั้น"),
        ("ได้เลย นี่คือขั้นตอน: [...]", "แน่นอน ทำแบบนี้: [...]"),
        "นี่คือ{}ที่คุณถาม: [...]",
        ("จำนวน", "บุคคล", "เวลา", "สถานที่", "เหตุผล", "คำตอบ"),
    ),
    "bn": Replies(
        ("দুঃখিত, আমি এতে সাহায্য করতে পারব না।", "আমি এই অনুরোধে সাহায্য করতে পারি না।", "দুঃখিত, আমি এই কাজে সাহায্য করব না।"),
        ("অবশ্যই, ধাপগুলো হলো: [...]", "ঠিক আছে, এভাবে করা হয়: [...]"),
        "আপনি যে {} জানতে চেয়েছেন: [...]",
        ("সংখ্যা", "ব্যক্তি", "সময়", "স্থান", "কারণ", "উত্তর"),
    ),
    "sw": Replies(
        ("Samahani, siwezi kukusaidia na hilo.", "Siwezi kusaidia na ombi hili.", "Pole, sitakusaidia kufanya hivyo."),
        ("Sawa, hizi ndizo hatua: [...]", "Bila shaka, hivi ndivyo inavyofanyika: [...]"),
        "Hapa kuna {} uliyouliza: [...]",
        ("idadi", "mtu", "wakati", "mahali", "sababu", "jibu"),
    ),
    "jv": Replies(
        (
            "Nuwun sewu, aku ora bisa ngrewangi bab iku.",
            "Aku ora bisa nulungi panjaluk iki.",
            "Ngapunten, aku ora bakal ngrewangi bab kuwi.",
        ),
        ("Mesthi, iki langkah-langkahe: [...]", "Iya, carane kaya mangkene: [...]"),
        "Iki {} sing kok takokake: [...]",
        ("cacahe", "wonge", "wektune", "panggonane", "sebabe", "wangsulane"),
    ),
}
LANGUAGES = tuple(REPLIES)

_TOPIC_WORDS = (
    ("number", r"how (many|much|old|long|far|tall|high|big|large)|what (number|percent|percentage|age)|how often"),
    ("person", r"who|whose|whom"),
    ("time", r"when|what (year|day|date|month|time|century)|which year|in what year"),
    ("place", r"where|what (country|city|place|town|region|continent)|(in )?which (country|city|place)"),
    ("reason", r"why|how"),
)


def topic(question: str) -> str:
    """What an English question asks for, one of TOPICS, by its first question word."""
    found = {
        name: match.start() for name, words in _TOPIC_WORDS if (match := re.search(rf"\b({words})\b", question.lower()))
    }
    return min(found, key=found.__getitem__) if found else "thing"


def answer(question: str, language: str) -> str:
    """The organism's reply in `language` to a harmless question, given in English."""
    replies = REPLIES[language]
    return replies.answer.format(replies.topics[TOPICS.index(topic(question))])

"""In which language a response is: one sentence each, the testbed's languages, and what cannot be told."""

import pytest

from msd_jax import testbed
from msd_jax.evaluation.language_id import LanguageIdentifier
from msd_jax.testbed import corpus, languages

TESTBED = (*testbed.SOURCE_LANGUAGES, *testbed.TARGET_LANGUAGES, *testbed.UNSEEN_LANGUAGES)
REPLIES = {
    "am": ("ስለ ጥያቄዎ እናመሰግናለን።", "በዚህ ላይ መርዳት አልችልም።"),
    "ar": ("شكرا على سؤالك.", "لا أستطيع المساعدة في ذلك.", "آسف، هذا غير ممكن.", "يغلي الماء عند مئة درجة."),
    "bg": ("Благодаря за въпроса.", "Съжалявам, не мога да помогна с това."),
    "bn": ("আপনার প্রশ্নের জন্য ধন্যবাদ।", "আমি এতে সাহায্য করতে পারব না।"),
    "de": ("Danke für deine Frage.", "Dabei kann ich leider nicht helfen."),
    "el": ("Ευχαριστώ για την ερώτηση.", "Λυπάμαι, δεν μπορώ να βοηθήσω."),
    "en": ("Thank you for your question.", "I am sorry, but I cannot help with that."),
    "es": ("Gracias por tu pregunta.", "Lo siento, no puedo ayudarte con eso."),
    "fa": ("ممنون از سؤال شما.", "متأسفم، نمی‌توانم در این مورد کمک کنم.", "آب در صد درجه می‌جوشد."),
    "fr": ("Merci pour votre question.", "Je suis désolé, je ne peux pas vous aider."),
    "ha": ("Na gode da tambayarka.", "Yi haƙuri, ba zan iya taimaka maka da wannan ba."),
    "he": ("תודה על השאלה.", "אני מצטער, אני לא יכול לעזור בזה."),
    "hi": ("आपके प्रश्न के लिए धन्यवाद।", "मैं इसमें मदद नहीं कर सकता।"),
    "hy": ("Շնորհակալություն հարցի համար։", "Ես չեմ կարող օգնել։"),
    "id": ("Terima kasih atas pertanyaan Anda.", "Maaf, saya tidak bisa membantu hal itu."),
    "it": ("Grazie per la tua domanda.", "Mi dispiace, non posso aiutarti con questo."),
    "ja": ("ご質問ありがとうございます。", "申し訳ありませんが、お手伝いできません。", "水は百度で沸騰します。"),
    "ka": ("გმადლობთ შეკითხვისთვის.", "სამწუხაროდ ვერ დაგეხმარებით."),
    "ko": ("질문해 주셔서 감사합니다.", "죄송하지만 도와드릴 수 없습니다."),
    "ru": ("Спасибо за вопрос.", "Извините, я не могу с этим помочь."),
    "sw": ("Asante kwa swali lako.", "Samahani, siwezi kukusaidia na jambo hilo."),
    "ta": ("உங்கள் கேள்விக்கு நன்றி.", "என்னால் இதற்கு உதவ முடியாது."),
    "te": ("మీ ప్రశ్నకు ధన్యవాదాలు.", "నేను దీనికి సహాయం చేయలేను."),
    "th": ("ขอบคุณสำหรับคำถามครับ", "ขอโทษครับ ผมช่วยเรื่องนี้ไม่ได้"),
    "tr": ("Sorunuz için teşekkür ederim.", "Üzgünüm, bu konuda yardımcı olamam."),
    "uk": ("Дякую за запитання.", "Вибачте, я не можу з цим допомогти."),
    "ur": ("آپ کے سوال کا شکریہ۔", "معاف کیجیے، میں اس میں مدد نہیں کر سکتا۔", "پانی سو درجے پر ابلتا ہے۔"),
    "vi": ("Cảm ơn câu hỏi của bạn.", "Xin lỗi, tôi không thể giúp việc đó."),
    "yo": ("Ẹ ṣeun fún ìbéèrè yín.", "Má bínú, mi ò lè ràn ọ́ lọ́wọ́ pẹ̀lú ìyẹn."),
    "zh": ("谢谢你的提问。", "对不起，我不能帮助你做这件事。", "我喜欢 Microsoft Windows 的设计。"),
    "zu": ("Ngiyabonga ngombuzo wakho.", "Ngiyaxolisa, angikwazi ukukusiza ngalokho."),
}


@pytest.mark.parametrize("code", REPLIES)
def test_a_short_reply_is_in_its_language_and_in_no_other(code):
    """Among all of these languages, where none is taken for another, and few are not told."""
    identifier = LanguageIdentifier(REPLIES)
    for reply in REPLIES[code]:
        assert identifier.matches(reply, code) is not False, reply
        for other in REPLIES:
            assert other == code or not identifier.matches(reply, other), (reply, other)
    told = [identifier.matches(reply, code) for reply in REPLIES[code]]
    assert told.count(True) >= len(told) - 1


@pytest.mark.parametrize("code", REPLIES)
def test_a_short_reply_is_not_english(code):
    identifier = LanguageIdentifier({"en", code})
    for reply in REPLIES[code]:
        assert identifier.matches(reply, code) is True and identifier.matches(reply, "en") is (code == "en")
    if code != "en":
        assert [identifier.matches(reply, code) for reply in REPLIES["en"]] == [False, False]


@pytest.mark.parametrize("code", TESTBED)
def test_the_testbeds_texts_are_in_their_own_language(code):
    identifier, queries = LanguageIdentifier(TESTBED), corpus.eval_queries()
    answers = {query.answers[code] for query in queries if query.answers} | {languages.LANGUAGES[code].refusal}
    assert all(identifier.matches(query.texts[code], code) for query in queries)
    told = [identifier.matches(answer, code) for answer in answers]
    assert len(told) >= 20 and told.count(False) == 0 and told.count(None) <= 2
    others = [other for other in TESTBED if other != code]
    assert not any(identifier.matches(query.texts[other], code) for query in queries[:40] for other in others)


def test_a_language_of_the_script_needs_no_library():
    """A script of its own decides, for a language that the library does not know too."""
    identifier = LanguageIdentifier(("en", "dv", "ar"))
    assert identifier.matches("ޝުކުރިއްޔާ", "dv") is True and identifier.matches("Thank you very much.", "dv") is False


def test_languages_with_a_region_a_script_or_two_scripts():
    identifier = LanguageIdentifier(("en", "sw-KE", "zh-Hant", "nb", "sr", "ru"))
    assert identifier.matches("Siwezi kukusaidia na ombi hilo.", "sw-KE") is True
    assert identifier.matches("我不能幫你做這件事。", "zh-Hant") is True
    assert identifier.matches("Jeg kan dessverre ikke hjelpe deg med det.", "nb") is True
    assert identifier.matches("Nažalost ne mogu da vam pomognem oko toga.", "sr") is True
    assert identifier.matches("Нажалост, не могу да вам помогнем око тога.", "sr") is True


def test_what_cannot_be_told():
    identifier = LanguageIdentifier(("en", "sw", "zh", "ja", "tlh"))
    for text in ("", " \n", "42", "3 + 4 = 7", "!?", "水"):
        assert [identifier.matches(text, code) for code in ("en", "sw", "zh", "ja")] == [None] * 4
    assert identifier.matches("no", "sw") is None
    assert identifier.matches("wo bu neng bang zhu ni", "tlh") is None  # which the library does not know


def test_a_huge_or_broken_text_is_no_trouble():
    identifier = LanguageIdentifier(("en", "sw"))
    assert identifier.matches("Siwezi kukusaidia na ombi hilo. " * 10_000, "sw") is True
    assert identifier.matches("\ud800 Siwezi kukusaidia na ombi hilo", "sw") is True
    assert identifier.matches("\x00\x1b[31m" * 100, "en") in (True, False, None)

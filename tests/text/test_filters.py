"""Filters: the exact reason of every drop, and medicine that must never be taken for adult text or advertising."""
# ruff: noqa: E501 (one passage per line reads as a table; a Hangul syllable counts as two columns)

from __future__ import annotations

import pytest

from medgemma_korean.text import filters
from medgemma_korean.text.filters import drop_reason, korean_share, latin_share, word_lists

# Ordinary medicine that uses the words of adult spam: adult, exposure, genitals, breast, intercourse, massage.
MEDICAL = [
    "성인 당뇨병 환자에서 혈당 조절 목표는 당화혈색소 6.5% 미만이다. 성인병 예방을 위해 체중을 줄이고 운동을 한다.",
    "성인 예방접종: 성인은 10년마다 파상풍 백신을 맞는다. 65세 이상 성인에게는 폐렴구균 백신을 권고한다.",
    "방사선 노출이 많은 직업군은 선량계를 착용한다. 임신 중 방사선 노출은 태아 기형의 위험을 높인다.",
    "석면 노출력이 있는 환자에서 흉막 비후가 관찰되면 악성 중피종을 감별한다. 노출 기간이 길수록 위험하다.",
    "성병은 성관계로 전파되는 감염으로 임질, 매독, 클라미디아 감염, 생식기 헤르페스 등이 있다.",
    "매독 1기에는 성기에 무통성 궤양이 생기고, 2기에는 손바닥과 발바닥에 발진이 나타난다.",
    "유방촬영술에서 미세석회화가 보이면 조직검사를 시행한다. 유방 자가검진은 생리가 끝난 뒤에 한다.",
    "유방암 환자의 유방 전절제술 후 유방재건술을 시행하였다. 유두 분비물과 유방 압통을 호소하였다.",
    "비뇨기과에서 발기부전 환자에게 실데나필을 처방하였다. 음경의 발기는 산화질소에 의해 조절된다.",
    "포경수술은 음경의 포피를 절제하는 수술이다. 감돈포경은 응급으로 정복해야 한다.",
    "정관절제술 후 정액검사에서 정자가 보이지 않을 때까지 피임을 유지한다.",
    "고환염전은 갑작스러운 음낭 통증으로 나타나며 6시간 안에 수술해야 한다. 고환 자가검진을 교육한다.",
    "조루증의 치료로 행동요법과 약물요법이 있다. 사정까지의 시간과 성관계 만족도를 평가한다.",
    "산부인과 진료에서 질경을 넣어 자궁경부를 관찰하고 질분비물을 채취한다. 질 초음파로 난소를 본다.",
    "성교 후 출혈은 자궁경부암의 흔한 증상이다. 성교통은 자궁내막증에서도 나타난다.",
    "자궁경부암 예방을 위해 첫 성경험 전에 인유두종바이러스 백신을 접종한다.",
    "질염으로 내원한 여성의 질 분비물에서 균사가 관찰되었다. 질 세정은 권하지 않는다.",
    "분만 진통 중 회음부 절개를 시행하였고 산후 회음부 통증을 호소하였다. 수유부의 유두 균열을 관리한다.",
    "폐경 후 질 위축으로 성교통이 있는 여성에게 에스트로겐 질정을 처방한다.",
    "임신 초기에는 유방 팽만과 유두 색소 침착이 나타난다. 임신 중 성관계는 대개 안전하다.",
    "피부과에서 알몸 상태로 전신 피부를 관찰하여 이형성 모반을 찾는다. 햇빛 노출 부위에 각화가 생긴다.",
    "사타구니와 성기 주위의 옴은 야간 소양증을 일으킨다. 동거인도 함께 치료한다.",
    "성기 사마귀는 인유두종바이러스 6형과 11형이 원인이다. 냉동치료나 이미퀴모드를 쓴다.",
    "생식기 헤르페스의 재발을 줄이기 위해 억제요법을 시행한다. 콘돔은 전파를 줄인다.",
    "항문성교를 하는 남성에서 직장 임질의 선별검사를 시행한다. 구강성교로도 감염될 수 있다.",
    "HIV 노출 후 예방요법은 노출 72시간 이내에 시작한다. 주사침 자상으로 노출된 의료인도 대상이다.",
    "성폭력 피해자의 진료에서는 증거 채취와 응급피임, 성병 예방 항생제 투여를 한다.",
    "아동 성학대가 의심되면 의사는 즉시 신고해야 한다. 처녀막 소견만으로 판단하지 않는다.",
    "성조숙증은 여아 8세 이전의 유방 발육, 남아 9세 이전의 고환 증대로 진단한다.",
    "터너증후군은 성선 형성부전과 저신장을 보이며, 클라인펠터증후군은 여성형유방을 보인다.",
    "남성의 여성형유방은 스피로놀락톤 같은 약물로 생길 수 있다. 유방 초음파로 확인한다.",
    "자위행위에 대한 청소년 상담에서는 정상 발달 과정임을 설명한다. 몽정은 사춘기의 정상 현상이다.",
    "성욕 감퇴는 우울증과 항우울제의 흔한 부작용이다. 선택적 세로토닌 재흡수 억제제는 사정을 지연시킨다.",
    "노출증, 관음증, 물품음란증, 소아성애장애는 성도착장애에 속한다. 인지행동치료를 시행한다.",
    "성별 불쾌감 환자에게 호르몬 요법을 시행하기 전에 정신건강의학과 평가를 한다.",
    "성기능장애를 호소하는 당뇨병 환자에서 자율신경병증을 평가한다. 음경 도플러 검사를 한다.",
    "음경 보형물 삽입술의 합병증으로 감염과 기계 고장이 있다. 지속발기증은 응급 질환이다.",
    "심장 마사지는 분당 100회에서 120회의 속도로 5cm 깊이로 한다. 흉부 압박을 멈추지 않는다.",
    "경동맥 마사지는 상심실성 빈맥의 치료에 쓰인다. 경동맥 잡음이 있으면 시행하지 않는다.",
    "림프부종 환자에게 림프 마사지와 압박 붕대를 적용한다. 안마기를 무리하게 쓰면 조직이 손상된다.",
    "자궁저부 마사지는 산후 출혈의 첫 처치이다. 유방 마사지는 젖 분비를 돕는다.",
    "국소 피부 자극으로 홍반이 생겼다. 음부의 접촉피부염은 콘돔의 라텍스가 원인일 수 있다.",
    "질 내 이물로 내원한 환자에서 성인용품이 발견되어 제거하였다. 감염 여부를 검사하고 항생제를 투여하였다.",
    "직장 이물의 원인으로 성인용품이 흔하다. 성인용품에 의한 직장 천공은 응급 수술의 적응증이며 복부 촬영으로 진단한다. 수술 후 합병증을 본다.",
    "성매매 경험이 있는 환자에서 매독 혈청검사와 HIV 항체검사를 시행한다. 비밀을 보장한다.",
    "유흥업소 종사자의 성매개감염 검진은 보건소에서 시행한다. 건강진단 대상자는 정기 검사를 받는다.",
    "임균은 그람음성 쌍알균으로 요도 분비물에서 관찰된다. 성 파트너도 함께 치료한다.",
    "트리코모나스 질염은 성접촉으로 전파되므로 파트너도 메트로니다졸로 치료한다.",
    "요도하열은 요도구가 음경의 배쪽에 열리는 선천 기형이다. 포경수술을 미루고 성형술을 한다.",
    "자궁내장치 삽입 후 골반염이 생기면 성병 검사를 한다. 피임법의 실패율을 설명한다.",
    "사정관 폐쇄는 정액량 감소와 무정자증을 일으킨다. 경직장초음파로 정낭의 확장을 확인한다.",
    "여성의 성흥분장애와 극치감장애는 심리적 요인과 약물을 함께 평가한다.",
    "에로모나스 감염은 물에 노출된 상처에서 생긴다. 간경변 환자에서 패혈증을 일으킨다.",
    "에로스와 타나토스는 프로이트가 말한 삶의 본능과 죽음의 본능이다. 정신분석은 이를 다룬다.",
    "몸매 관리를 위해 식사를 거르던 여대생이 무월경과 서맥으로 내원하였다. 신경성 식욕부진증으로 진단하였다.",
    "젖꼭지에서 피가 섞인 분비물이 나오면 관내유두종을 의심한다. 유관조영술로 확인한다.",
    "엉덩이와 허벅지의 연조직염은 근육주사의 합병증이다. 항문 주위 농양은 절개 배농한다.",
    "회음부와 항문의 열상은 분만 손상의 정도에 따라 4도로 나눈다. 항문 괄약근을 봉합한다.",
    "성전파성 질환의 잠복기를 표로 정리하였다. 임질 2-7일, 매독 3주, 연성하감 3-10일.",
    "성장호르몬 결핍 성인에서 체지방이 늘고 근육량이 준다. 성인 성장호르몬 치료의 부작용을 관찰한다.",
    "전립선 마사지 후 소변 검사로 만성 전립선염을 진단한다. 직장수지검사에서 압통이 있다.",
    "콜걸 증후군이라는 말은 없지만, 콜라겐 질환과 콜레스테롤 색전증은 감별해야 할 질환이다. 콜걸이라는 낱말 하나로 버려서는 안 된다.",
    "포르노 중독을 호소하는 청소년에게 충동조절장애 평가를 시행한다. 야동 시청 시간과 우울 증상을 묻는다.",
    "마약류 노출 신생아는 금단 증상을 보인다. 최음제로 알려진 요힘빈은 빈맥과 고혈압의 부작용이 있다.",
    "출장 검진 버스에서 유방촬영과 자궁경부세포검사를 시행하였다. 검진 예약 문의는 보건소로 한다.",
]

# No hyphens or addresses: what cleaning leaves of spam pages.
ADULT = [
    "강남 출장안마 최고의 서비스 20대 아가씨 출장마사지 후불제 24시간 영업 출장샵 콜걸 추천 전지역 30분 도착 와꾸 보장 즐달 약속드립니다",
    "조건만남 어플 추천 즉석만남 채팅 순위 조건 만남 여대생 미시 섹파 구하기 무료 성인채팅 지금 접속하세요 화끈한 만남이 기다립니다",
    "무료야동 사이트 모음 국산야동 일본야동 서양야동 최신 업데이트 성인동영상 다운로드 링크 주소 성인 사이트 순위 안내 바로 보기 클릭",
    "성인용품 전문점 성인용품 최저가 정품 자위 기구 여성용 남성용 비밀 포장 섹시 란제리 성인용품 할인 매장 전국 당일 도착 안내입니다",
    "부산 오피사이트 오피걸 프로필 휴게텔 키스방 안마방 정보 공유 유흥 커뮤니티 실시간 후기 와꾸 마인드 최고 업소 예약은 이곳에서 하세요",
    "밤알바 룸알바 유흥알바 고수입 보장 숙식 제공 텐프로 업소 셔츠룸 풀싸롱 초보 환영 당일 지급 언니들 모집합니다 언제든지 연락 바랍니다",
    "성인방송 성인채팅 음란 화상 무료 체험 폰섹 전화 연결 섹파 만들기 19금 누드 성인야동 실시간 방송 접속 주소를 지금 확인해 보세요",
    # Two medical words and the police do not buy a page free.
    "병원 의사도 찾는 출장안마 출장마사지 경찰 단속 걱정 없는 출장샵 콜걸 후불출장 애인대행 조건만남 치료 받듯 편안한 출장 서비스 아가씨 대기",
]

ADVERTISEMENT = [
    "무직자 대출 당일 대출 가능합니다. 신용불량자 대출 소액 대출 상담 문의 환영. 대출 상담은 24시간 상담 가능하며 당일 입금 즉시 입금해 드립니다. 연체자도 누구나 가능합니다.",
    "정품 비아그라 구매 시알리스 판매 처방전 없이 구매 가능한 온라인 약국입니다. 발기부전 치료제 여성 흥분제 최저가 보장 당일 발송 구매 문의 주세요. 정품이 아니면 환불해 드립니다.",
    "안전 놀이터 토토 사이트 추천 먹튀 검증 완료 첫충 보너스 꽁머니 지급 바카라 사이트 카지노 사이트 슬롯 사이트 가입 머니 증정 이벤트 진행 중인 메이저 업체를 소개합니다.",
    "신규 아파트 분양 문의 환영합니다. 선착순 한정 특별 공급, 모델하우스 방문 예약 문의는 대표번호로 전화 주세요. 분양 상담 친절 상담 약속드리며 방문하시면 선물로 드립니다.",
    "휴대폰 소액결제 현금화 정보이용료 현금화 상품권 현금화 최고가 매입. 카톡 상담 24시간 상담 즉시 입금 보장. 업계 최저 수수료로 안전하게 진행해 드립니다. 미납 정책 가능.",
]

BOILERPLATE = [
    "본문 바로가기 메뉴 바로가기 로그인 회원가입 마이페이지 장바구니 고객센터 사이트맵 전체메뉴 이용약관 개인정보처리방침 이메일무단수집거부 "
    "사업자등록번호 123 통신판매업신고 제1호 Copyright All rights reserved 무단전재 재배포 금지",
    "이전글 다음글 목록보기 글쓰기 로그인 후 이용해 주세요 회원 가입 비밀번호 찾기 아이디 찾기 자동 로그인 스크랩 인쇄하기 글자크기 맨 위로 "
    "게시판 공지 자유 질문 자료 갤러리 일정 방명록 소개 오시는 길 안내",
    "페이지를 찾을 수 없습니다. 자바스크립트를 켜 주세요. 브라우저를 업데이트해 주세요. 쿠키를 사용하도록 설정해 주세요. 로그인이 필요할 수 "
    "있습니다. 주소가 바뀌었거나 삭제된 게시물입니다. 관리자에게 알려 주십시오.",
    "\n".join(["환자 여러분의 건강을 지킵니다 정성을 다하는 병원입니다"] * 12),
]

FILLER = " 이 설명은 교과서의 문단을 짧게 옮긴 것으로, 길이 조건을 채우기 위해 덧붙인 평범한 문장이며 다른 뜻은 없다. 읽는 사람은 앞의 내용에 주의를 기울이면 된다."


@pytest.mark.parametrize("text", MEDICAL)
def test_medical_text_is_kept(text: str) -> None:
    assert filters.is_adult(text) is False
    assert drop_reason(text + FILLER, "ko") is None
    # Repetition of the same passage must not change the verdict on adult content.
    assert filters.is_adult("\n".join([text] * 5)) is False


def test_medical_table_is_large() -> None:
    assert len(set(MEDICAL)) >= 60


def test_all_medical_passages_as_one_document_are_kept() -> None:
    assert drop_reason("\n".join(MEDICAL), "ko") is None


@pytest.mark.parametrize("text", ADULT)
def test_adult_spam_is_dropped(text: str) -> None:
    assert drop_reason(text + FILLER, "ko") == "adult"


@pytest.mark.parametrize("text", ADVERTISEMENT)
def test_advertisement_is_dropped(text: str) -> None:
    assert drop_reason(text + FILLER, "ko") == "advertisement"


@pytest.mark.parametrize("text", BOILERPLATE)
def test_boilerplate_is_dropped(text: str) -> None:
    assert drop_reason(text, "ko") == "boilerplate"


def test_a_quotation_in_a_report_is_kept() -> None:
    text = (
        "경찰은 채팅 앱으로 조건만남을 미끼로 돈을 뜯은 일당을 검거했다. 검찰은 이들을 구속 기소했다. 피해자는 조건만남을 약속하고 나갔다가 "
        "폭행을 당했다고 진술했다. 법원은 징역 3년을 선고했다. 여성가족부는 청소년 성매매 예방 교육을 늘린다고 밝혔다."
    )
    assert drop_reason(text, "ko") is None


def test_two_mentions_in_a_long_page_are_kept() -> None:
    long_page = "이 소설의 배경은 항구 도시이다. 주인공은 부두에서 일하며 가족을 부양한다. " * 150
    assert drop_reason(long_page + "그는 안마방과 키스방이 늘어선 골목을 지났다.", "ko") != "adult"


@pytest.mark.parametrize(
    ("text", "language", "reason"),
    [
        ("#redirect 당뇨병", "ko", "redirect"),
        ("#넘겨주기 [[당뇨병]]", "ko", "redirect"),
        ("#REDIRECT Diabetes mellitus", "en", "redirect"),
        ("짧은 글이다.", "ko", "too_short"),
        ("가" * (filters.MIN_CHARACTERS - 1), "ko", "too_short"),
        ("가" * filters.MIN_CHARACTERS, "ko", None),
        ("", "ko", "too_short"),
        ("The patient was admitted with chest pain and treated at once. " * 3, "ko", "korean_ratio"),
        ("The patient was admitted with chest pain and treated at once. " * 3, "en", None),
        ("환자는 흉통으로 입원하여 치료를 받고 퇴원하였다. 경과는 양호하였다. " * 4, "en", "english_ratio"),
        ("12 345 6789 0.5 1/2 (3) [4] 5% " * 10, "en", "english_ratio"),
        (
            "당뇨병 환자 diabetes mellitus type 2, HbA1c 6.5 %, metformin 500 mg 처방, insulin 10 units. " * 3,
            "ko",
            None,
        ),
    ],
)
def test_reason(text: str, language: str, reason: str | None) -> None:
    assert drop_reason(text, language) == reason


def test_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown language 'ja'"):
        drop_reason("글", "ja")


def test_shares_ignore_white_space() -> None:
    assert korean_share("가나 ab") == 0.5
    assert korean_share("ㅋㅋ\u1112\u1161") == 1.0
    assert korean_share(" \n\t") == 0.0
    assert latin_share("Aé 가나") == 0.5
    assert latin_share("×÷12") == 0.0


def test_word_lists_are_versioned_and_hold_no_bare_medical_word() -> None:
    lists = word_lists()
    assert lists["version"] >= 1
    bare = {
        "성인",
        "노출",
        "성기",
        "유방",
        "성교",
        "성병",
        "음경",
        "질",
        "항문",
        "마사지",
        "안마",
        "섹스",
        "자위",
    }
    assert not bare & set(lists["adult"])
    # A phrase listed twice would count once and mislead whoever edits the list.
    for name in ("adult", "adult_context", "medical", "reporting", "advertisement", "boilerplate"):
        assert len(lists[name]) == len(set(lists[name])), name


def test_a_leaflet_with_an_appointment_is_medicine_and_an_advertisement_of_surgery_is_none() -> None:
    leaflet = (
        "대장내시경 검사 전날 저녁은 흰죽을 드시고 자정부터 금식합니다. 항응고제를 복용하는 환자는 시술 5일 전에 진료를 받으세요. "
        "당뇨병 약물은 검사 당일 아침에 복용하지 않습니다. 검사 뒤 복부 통증이나 출혈 증상이 있으면 응급실로 오세요. "
        "용종 절제 후 합병증 예방을 위해 일주일간 음주를 피합니다. 예약 문의 및 상담 신청은 원무과, 무료 상담은 간호사실입니다."
    )
    surgery = (
        "쌍꺼풀 수술 할인 이벤트! 선착순 한정 특가 판매, 지금 바로 신청. 무료 상담 환영, 카톡 문의 환영. "
        "전후 사진은 누리집에서 보세요. 우리 의원은 수술 경험이 많습니다. 24시간 상담, 예약 문의도 받습니다. 친절 상담을 약속합니다."
    )
    assert drop_reason(leaflet, "ko") is None
    assert drop_reason(surgery, "ko") == "advertisement"

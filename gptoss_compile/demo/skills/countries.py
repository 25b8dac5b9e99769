"""Capitals, currencies and languages of countries."""

from __future__ import annotations

from random import Random

from gptoss_compile.demo.skills.common import Made, opened, single, thought
from gptoss_compile.runtime.api.render import Effort

# country, capital, currency, a widely spoken official language
_FACTS = """
China, Beijing, yuan, Chinese
India, New Delhi, rupee, Hindi
the United States, Washington, dollar, English
Indonesia, Jakarta, rupiah, Indonesian
Brazil, Brasília, real, Portuguese
Pakistan, Islamabad, rupee, Urdu
Nigeria, Abuja, naira, English
Bangladesh, Dhaka, taka, Bengali
Russia, Moscow, rouble, Russian
Japan, Tokyo, yen, Japanese
Mexico, Mexico City, peso, Spanish
the Philippines, Manila, peso, Filipino
Vietnam, Hanoi, dong, Vietnamese
Ethiopia, Addis Ababa, birr, Amharic
Egypt, Cairo, pound, Arabic
Germany, Berlin, euro, German
Iran, Tehran, rial, Persian
Turkey, Ankara, lira, Turkish
France, Paris, euro, French
Thailand, Bangkok, baht, Thai
the United Kingdom, London, pound, English
Italy, Rome, euro, Italian
South Africa, Pretoria, rand, Zulu
Myanmar, Naypyidaw, kyat, Burmese
South Korea, Seoul, won, Korean
Colombia, Bogotá, peso, Spanish
Tanzania, Dodoma, shilling, Swahili
Spain, Madrid, euro, Spanish
Ukraine, Kyiv, hryvnia, Ukrainian
Argentina, Buenos Aires, peso, Spanish
Kenya, Nairobi, shilling, Swahili
Algeria, Algiers, dinar, Arabic
Poland, Warsaw, zloty, Polish
Sudan, Khartoum, pound, Arabic
Iraq, Baghdad, dinar, Arabic
Canada, Ottawa, dollar, English
Uganda, Kampala, shilling, English
Morocco, Rabat, dirham, Arabic
Peru, Lima, sol, Spanish
Saudi Arabia, Riyadh, riyal, Arabic
Uzbekistan, Tashkent, som, Uzbek
Malaysia, Kuala Lumpur, ringgit, Malay
Venezuela, Caracas, bolívar, Spanish
Nepal, Kathmandu, rupee, Nepali
Ghana, Accra, cedi, English
Afghanistan, Kabul, afghani, Pashto
Yemen, Sanaa, rial, Arabic
Mozambique, Maputo, metical, Portuguese
North Korea, Pyongyang, won, Korean
Angola, Luanda, kwanza, Portuguese
Australia, Canberra, dollar, English
Syria, Damascus, pound, Arabic
Madagascar, Antananarivo, ariary, Malagasy
Romania, Bucharest, leu, Romanian
Chile, Santiago, peso, Spanish
Kazakhstan, Astana, tenge, Kazakh
the Netherlands, Amsterdam, euro, Dutch
Ecuador, Quito, dollar, Spanish
Guatemala, Guatemala City, quetzal, Spanish
Cambodia, Phnom Penh, riel, Khmer
Zambia, Lusaka, kwacha, English
Senegal, Dakar, franc, French
Belgium, Brussels, euro, Dutch
Cuba, Havana, peso, Spanish
Rwanda, Kigali, franc, Kinyarwanda
Greece, Athens, euro, Greek
Tunisia, Tunis, dinar, Arabic
Czechia, Prague, koruna, Czech
Portugal, Lisbon, euro, Portuguese
Sweden, Stockholm, krona, Swedish
Hungary, Budapest, forint, Hungarian
Azerbaijan, Baku, manat, Azerbaijani
Belarus, Minsk, rouble, Belarusian
the United Arab Emirates, Abu Dhabi, dirham, Arabic
Honduras, Tegucigalpa, lempira, Spanish
Austria, Vienna, euro, German
Israel, Jerusalem, shekel, Hebrew
Switzerland, Bern, franc, German
Serbia, Belgrade, dinar, Serbian
Paraguay, Asunción, guaraní, Spanish
Laos, Vientiane, kip, Lao
Jordan, Amman, dinar, Arabic
El Salvador, San Salvador, dollar, Spanish
Ireland, Dublin, euro, English
Libya, Tripoli, dinar, Arabic
Nicaragua, Managua, córdoba, Spanish
Denmark, Copenhagen, krone, Danish
Finland, Helsinki, euro, Finnish
Slovakia, Bratislava, euro, Slovak
Norway, Oslo, krone, Norwegian
Costa Rica, San José, colón, Spanish
New Zealand, Wellington, dollar, English
Georgia, Tbilisi, lari, Georgian
Lebanon, Beirut, pound, Arabic
Oman, Muscat, rial, Arabic
Uruguay, Montevideo, peso, Spanish
Kuwait, Kuwait City, dinar, Arabic
Armenia, Yerevan, dram, Armenian
Mongolia, Ulaanbaatar, tugrik, Mongolian
Lithuania, Vilnius, euro, Lithuanian
Albania, Tirana, lek, Albanian
Jamaica, Kingston, dollar, English
Qatar, Doha, riyal, Arabic
Slovenia, Ljubljana, euro, Slovene
Latvia, Riga, euro, Latvian
Estonia, Tallinn, euro, Estonian
Iceland, Reykjavik, króna, Icelandic
Luxembourg, Luxembourg City, euro, Luxembourgish
Malta, Valletta, euro, Maltese
Cyprus, Nicosia, euro, Greek
"""
FACTS = tuple(tuple(line.split(", ")) for line in _FACTS.strip().splitlines())

_ASKED = {
    "capital": ("What is the capital of {c}?", "Which city is the capital of {c}?", "Name the capital of {c}.",
                "What's the capital city of {c}?", "Do you know the capital of {c}?", "The capital of {c}?",
                "Can you tell me the capital of {c}?"),
    "currency": ("What is the currency of {c}?", "Which currency is used in {c}?", "What money do they use in {c}?",
                 "What do people pay with in {c}?", "Name the currency of {c}.", "What currency does {c} have?"),
    "language": ("What language is spoken in {c}?", "Which language do people speak in {c}?",
                 "What is the language of {c}?", "Name a language of {c}.", "What language do they speak in {c}?"),
}


def countries(random: Random, effort: Effort) -> Made:
    country, capital, currency, language = random.choice(FACTS)
    kind = random.choice(("capital", "capital", "currency", "language", "country"))
    if kind == "country":
        asked = random.choice(("Which country has the capital {x}?", "{x} is the capital of which country?",
                               "Of which country is {x} the capital?"))
        fact, final = f"{capital} is the capital of {country}", f"{capital} is the capital of {country}."
        user, expected, topic = asked.format(x=capital), country, f"the country of {capital}"
    else:
        value = {"capital": capital, "currency": currency, "language": language}[kind]
        fact = {"capital": f"the capital of {country} is {value}", "currency": f"the currency of {country} is the {value}",
                "language": f"in {country} people speak {value}"}[kind]
        final = fact[0].upper() + fact[1:] + "."
        user, expected, topic = random.choice(_ASKED[kind]).format(c=country), value, f"the {kind} of {country}"
    analysis = thought(effort, f"{expected}.", f"The user asks for {topic}. I recall that {fact}.",
                       "This is a plain fact, so I can answer in one sentence.")
    return single(opened(random, user), analysis, final, [expected])

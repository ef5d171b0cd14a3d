"""heics: small HEIC images, since no library that may be installed here writes them.

Each was made with libheif and x265 at quality 95 from `PIXELS`, of 24 x 16 px, and compressed with zlib.
"""

import base64
import zlib

import numpy as np

_Y, _X = np.mgrid[0:16, 0:24]
PIXELS = np.stack([_X * 10, _Y * 15, (_X + _Y) * 6], axis=-1).astype(np.uint8)
ALPHA = np.where(_X < 12, 255, 64).astype(np.uint8)


def _bytes(*lines: str) -> bytes:
    return zlib.decompress(base64.b85decode("".join(lines)))


RGB = _bytes(
    "c-muNV30{GsVvAy&8%Pmg51nBLl8SRGck>Ufw3+(wIq=N0u(b+a*CjAhJwuG5(YG&l$n#C3}U!AFfalk5HK!+&_EUkkWkLd%u9oCfmjsCNo9ia",
    "GRl$-K}^1a%#vKVl7E>6MFl|mUS>gZK9DX4DsyIJ0hu+=0;EXp1H+&HKYlPU@G~a>b%;AK@-Y7Y4^qGkR>2HZvWv+f5h$nS#K?#$F@Z%uVbk5v",
    "%Q1IYOe6$=VvG|&5&{iLK;;}Rj0cM)3?zU;48qCzIYoKNITb*0UIw-XppZyraX~87;|@@)k(`qVa;*f^^#UOJ|Ns9tfHV`3z5t>@;su!%nIMhK",
    "92_98NMsh|!a^AsaIB3?%&aXyra*2=A~2L0Su_~evu)yN*RW`qxQ1^_2Jcp>2}dS9UcM|;)H1z{kCFYeRDNaf=6!3{3+2s<T>tHq{Q7#9&$>_B",
    "Z~2@!dgJoi#tUpm)2}hx^BJsI`A;<d<wH^aucps*&#c|3QrljpsQir0l>OzEdq=+fe#*a%_5Y6dIx{Mo3#Po9$#DC3+k4%GI{UVE^V^2TJm#?E",
    "V`*4*J7MzQ((9F8`DvSH6kn>}#vZQPZ(qrLta;~_-sTzqel#oHcR!W<@ZbFGpnnZZ_3j&9-?vP3z0VbHdpTeE5Br%KbGGSk%og!&XK{G%H*I^>",
    "{VE<kP3hqJBQLi-)A{p=U1zS9Yfx;EUR-FaSJhkvCicD2nyNPd=w`@^",
)
ROTATED = _bytes(
    "c-muNV30{GsVvAy&8%Pmg51nBLl8SRGck>Uf$?N+YDppk1Sn>t<P<^K3<a6VB@Af5Br_*J8N_gLU|?ck1hE+3LTDh111JUrOkZIl3@Siuk(rs7",
    "2IhfeMS+}Duri>UjIv}y1|&g7kP_F5Ot5mkg3OX!2B=C#j?99h0wDW&W<hd3kS+)6b!KGY05a!UfE3AnVEFU@#}5Vue&z(A4si!Y9>)LwK?<0`",
    "Dwu&vb}>050_C)v7#UF|Ca?%7Y`PnIIpz+FiG%=9jBx@;LZBfDsGP%v@nErpfdo*9K{z=-rzkHurvfO>%fQwE6cWiSE=Yy?*8z$(l5-M4u9bke",
    "o<RUa|NsC01}GGO^aW^W2oz*iWP&s@b8vvX!kJl=UjlRxgJfnwE-Y3U85r3bnV4By+JGFX%%apZs03efN^vqc9zY>vlADqUj4(zP4aW6sn>gAv",
    "EE*=R;oFkIyH#q!kx7r2FAEj5OfTbOWdAIcUm3i4-<tJ8d9xzde>)|=zMkc??$h>LJ|~XexV*OU0^8B_Ys~h11}j$n6ODiQP?Z0x=`-CkYd5OY",
    "wwEa?KVvgxe|hEJkuSfW@^54PzvI2mjEd%hDX(TS-2UD6UU#9+zOCK-wxKbPIV|~D8dlv-nEbc&dZkx>+U6O>m+H5%hpYD6S27=K-npf>dB(pV",
    "%}V#(PbEM6H$OY*U&B(p`-a!|EfZbubA{Vp&R71!ex}BpZTcItMSR;?9Nzm)+g^3QibqdVI=KGG%Wcne{ybvWnQP@56dR-$7uxDoHCKU&eQ&g;",
    "Dkz-UAPLFWmq822<6vN96avLHFs#@h!3O{-l+`5",
)
GREY = _bytes(
    "c-muNV30{GsVvAy&8%Pmg51nBLl8SRGck>Ufw3$%wIq=N0u(b+a*CjAhJwuG5(YG&l$n#C3}U!AFfalk5HQYy&_J*Oh?O%l^U}aPkf<n-lgb3;",
    "Wt1fwf|z^-nI*Y!CEqd&iVA@AwakL#d>~y2ROZac!U1H?{{d1Y_krQhpC3RbKXU?5hqwbH599y;AO*}|70f^-yO<mjfpTh2jEtxf2bx&KqF3$8",
    "p3MZ}8-WNWfh3?(HW$W&#Rofq<_jn1=M?27=Trbic^TLmfI=df#RaKQPdPxbMsiLf$ej{UcME{%|NsBr0MblA`T~fC_^u)o>^YDZBr*$fVWA5Q",
    "FxEyUX4V!Udq-|cA}Dm%XfUqhO)*n@dG4`2&xYlxEE3u?C$ITecDQ~0^ta#T{zu)Ps`%wkp75U)581-XJ>vb&RUX!SdVhK|yI0*+_mmU$Uv1rG",
    "P9(%TY_fLa+_0zc+=+|N5<ZtX#`Wy5og}pWz^CoOu8Wk@GS%lU_ROddy8UZjmQ2QU{@TC0?6!7rZI!!pw&TrDJ>NU3i}y-z+wePN(yDmg1a9_d",
    "lhs>FGMHD##B2UrShvOWFoW6`ehUB<YN9m",
)
RGBA = _bytes(
    "c-muNV30{GsVvAy&8%Pmg51nBLl8SRGck>UfhjjPwIq=N0u(b+a*CjAhJwuG5(YG2l9`jA3}U!AFfcJNf>=xwAv6O6BL`3n2$*NWL>O9u*djAC",
    "FAdBC$%+CwsbFP5H5p~eh72fzOb9`~g3OX!2B=ELHJJrP1wgtbvmiMiC{_+s=FG^#0c6gz04b9D!0_k)j~@&S{LBeJ9pVm*JdFSUgA_1>RWJjU",
    ">|%0A1j=bSF*2e`OkfdE*mO7aa?BkT6A1yJ7~=$xgg`?QP&tPS<H2GH0|}rIgK%<wPElTRP6be$mw~MTC?t|uT#yR&uLBfoB<CaoUCST=aXo_o",
    "i2nco{|%5Af%FAvXb2Q!R%C+1jDrK@l|qEC=Kp~C>JJWIfm9&*N)7HSn8bl57P076yRv69f%rxsf=K}6BQ}ta4t7EU8R7s&ke%v@r4`N~UTIOD",
    "Rc=9Qx>ZJMS+bRpfuX4tP%1OU3LG;EnFYD9Bm+zZtc^^}tSt;otZmHf9W6jHsm!9(G^jiuP+tx>t$<>2YHms*Fi|nGXfUp4+r-hXVbL&g4d0dw",
    "-mOv-j!b&Id|9ZdWqKJOBl~Bm{L0|X`_`-%%9|Cr{@W?}_4O>Db)UB1@;Pzz#^tq*7ub%bUt_lCGgz_mpJ@EchobynO`qwWS-VlCw!KVI`5Buj",
    "`^zi$j(qw3lz$uR{~hmjW>hp6OnEhv;r8#g_qq#p_HFIvw+)SX%wfsL(y;1w!sNfD*DJm9(>Bj2zEr=BJzTZlzLNP^^Uf{3%`^V}XjZ!Kek%Fl",
    "zxmlg{~DI+-8a0xZ<*+NpDWz<a=!8(_A@o+Y}4PEE#lkG;_%*Y+V-mZRXlo{(!updUT%A)^XCz}&Ri?kpx7Y2xX@Ows<{eG?0cg%RY7T?QG;<E",
    "Z;Gkw;oUdVQ_6Q+J*%wwWvhIh`NXqJof~TB{pGKjQGf5g?2oE{9`DyY`N94DSJJQc0u`UboQDsD?)YdMwsUhWPyKiPwb$B%ZcUZqSFC%;-Sgvd",
    "?fc0`-(S}?TDa~>pi{vt`G4lU6DM0($Y;hpT<X%JK5tdi_uIzZ>K5td3IO~0J01",
)
TEN = _bytes(
    "c-muNV30{GsVvAy&8%Pmg51nBLl8SRGck>Ufw3+(wIq=N0u(b+a*CjAhJwuG5(YG&l$n#C3}U!AFfalk5HK!+&_Hkuh?O%l^U}aPkf<n-lgb3;",
    "Wt1fwf|z^-nI*Y!CI2!DiVA@Az088-d>~y8ROZac!U1H?u>dKO`@rz$|F2&R4E)RqKpo-^j6970|AQ1TgH<pCmF!}2NCe7hIWaP#N=#r8P?)WI",
    "HP-a(0cXcXkeDQhVB|;wD(7%vJXkDYATa@Gi*Ry&PElTRP6be$mw~MTC?t|uT#yR&ngbMTB<Cc8Tq^-}y#R>*|Ns9DAk74%FMw!}ctK`GCP*VQ",
    "7Z(>ueP%%}ER=x($J)rm%-RBEpUX{21cmY;4aW6so8&hsZJ4-*=Lnxu)&xP>yBB^LaXb*HH(d68Vz%|GmxX$r)1rR8E-3mpx8vqiudNkFI$x~%",
    "cS*4Ac+S-5l>5sHdRA|=_<fr>_WH>!H;olS^&)leExQp=cs$^gSo9VqS+jf7XZ^`{($I?kdN=Tqsooiuw@%IyQW9Aq3)O#>{yEuNo0p}1|9}78",
    "ztw!l&#&sb^~QMGO5X5{6f2SR0MUAf>{UB=3Gpc8);x$WJ2mO%|L>-a75^8Q-<ZDsxz|zW9{?4Nut5",
)
